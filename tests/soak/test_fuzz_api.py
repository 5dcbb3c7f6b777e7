"""Twenty seconds of ``fuzz_api.py``: no 500, one envelope, whatever is sent to whichever route."""

from fuzz_api import Fuzz

SECONDS = 20.0


def test_bad_requests_over_every_route(tmp_path):
    fuzz = Fuzz(tmp_path, seed=7)
    assert len(fuzz.targets) > 140, "every dialect is among the routes"
    sent = fuzz.run(2 * len(fuzz.targets), SECONDS)
    assert not fuzz.bad, "\n".join(fuzz.bad)
    assert sent > 50
    assert {200, 400, 404} <= set(fuzz.counts)


def test_a_bug_would_be_found(tmp_path):
    fuzz = Fuzz(tmp_path, seed=1)

    @fuzz.app.get("/v1/broken")
    def broken():
        raise KeyError("x")

    @fuzz.app.get("/v1/rude")
    def rude():
        from starlette.responses import JSONResponse

        return JSONResponse({"detail": "no"}, 400)

    for path in ("/v1/broken", "/v1/rude"):
        fuzz.send("GET", path, {})
    assert [line[:3] for line in fuzz.bad] == ["500", "400"]
