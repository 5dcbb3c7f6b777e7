"""So many requests a minute of one key, as its operator said; other keys are not touched."""


def test_a_key_that_asks_too_often_is_told_when_to_come_again(start):
    server = start("limited", "--requests-per-minute", "5", "--slots", "0")
    answers = [server.ask("/v1/models") for _ in range(8)]
    statuses = [status for status, _, _ in answers]
    assert statuses[:5] == [200] * 5
    assert 429 in statuses[5:]
    _, body, headers = answers[statuses.index(429)]
    assert body["error"]["type"] == "rate_limit_error"
    assert "try again in" in body["error"]["message"]
    assert 0 < float({name.lower(): value for name, value in headers.items()}["retry-after"]) <= 12
    assert server.ask("/healthz", key=None)[0] == 200


def test_without_the_option_there_is_no_limit(served):
    assert {served.ask("/v1/models")[0] for _ in range(40)} == {200}
