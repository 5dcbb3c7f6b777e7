"""What every store does, whatever is behind it."""

import threading

import pytest

from preftune.store.base import Conflict, LeaseLost, Query
from preftune.store.opening import open_store
from preftune.store.records import Event, File, Job, ModelVersion, new_id, now


def job(**changes):
    return Job(**{"id": new_id("ft-"), "project": "p", "work": "train", "status": "queued"} | changes)


def file(name, **changes):
    return File(**{"id": new_id("file-"), "project": "p", "filename": name, "purpose": "fine-tune"} | changes)


def test_a_record_comes_back_as_it_was(store):
    given = file("a.jsonl", report={"rows": [1, {"x": "é\u2028"}]}, num_rows=3, sha256="f" * 64)
    kept = store.insert(given)
    assert kept.number > 0
    assert kept.model_copy(update={"number": 0}) == given
    assert store.get(File, given.id) == kept
    assert store.get(File, given.id, "p") == kept
    assert store.get(File, given.id, "another project") is None
    assert store.get(File, "file-none") is None


def test_an_id_is_given_once(store):
    one = store.insert(file("a"))
    with pytest.raises(Conflict):
        store.insert(file("b", id=one.id))
    assert store.get(File, one.id).filename == "a"


def test_what_must_be_unique_is(store):
    model = ModelVersion(id="ml_1", project="p", name="m", version=1, form="full")
    store.insert(model)
    with pytest.raises(Conflict):
        store.insert(model.model_copy(update={"id": "ml_2"}))
    store.insert(model.model_copy(update={"id": "ml_2", "version": 2}))
    store.insert(model.model_copy(update={"id": "ml_3", "project": "q"}))
    store.insert(job(idempotency=None))
    store.insert(job(idempotency=None))  # no key is no clash
    store.insert(job(idempotency="k"))
    with pytest.raises(Conflict):
        store.insert(job(idempotency="k"))


def test_pages_neither_skip_nor_repeat(store):
    ids = [store.insert(file(str(index), purpose="a" if index % 3 else "b")).id for index in range(11)]
    for is_newest_first in (True, False):
        seen, after = [], None
        while True:
            page = store.page(File, Query("p", {"purpose": "a"}, after, 3, is_newest_first))
            seen += [one.id for one in page.items]
            after = seen[-1]
            if not page.has_more:
                break
        wanted = [one for index, one in enumerate(ids) if index % 3]
        assert seen == (wanted[::-1] if is_newest_first else wanted)
    assert store.count(File, Query("p", {"purpose": "a"})) == 7
    assert store.page(File, Query("another")).items == ()
    assert len(store.page(File, Query(None, limit=100)).items) == 11
    assert store.page(File, Query("p", after="file-none")).items == ()


def test_a_page_after_a_deleted_record_goes_on(store):
    ids = [store.insert(file(str(index))).id for index in range(5)]
    store.change(File, ids[2], {"deleted_at": now()})
    page = store.page(File, Query("p", after=ids[2], limit=10))
    assert [one.id for one in page.items] == [ids[1], ids[0]]
    assert store.get(File, ids[2]) is None
    assert store.get(File, ids[2], with_deleted=True) is not None


def test_lists_are_narrowed_by_several_values_and_by_metadata(store):
    one = store.insert(job(status="queued", metadata={"team": "a"}))
    two = store.insert(job(status="failed", metadata={"team": "b"}))
    store.insert(job(status="paused"))
    found = store.page(Job, Query("p", {"status": ("queued", "failed")})).items
    assert {row.id for row in found} == {one.id, two.id}
    assert [row.id for row in store.page(Job, Query("p", metadata={"team": "b"})).items] == [two.id]
    with pytest.raises(ValueError, match="cannot be listed by recipe"):
        store.page(Job, Query("p", {"recipe": "x"}))


def test_a_change_happens_only_where_it_was_expected(store):
    one = store.insert(job(status="queued"))
    event = Event(id=new_id("evt_"), project="p", subject=one.id, type="x")
    assert store.change(Job, one.id, {"status": "cancelled"}, expect={"status": ("running", "paused")}, events=[event]) is None
    assert store.page(Event, Query("p", {"subject": one.id})).items == ()
    changed = store.change(Job, one.id, {"status": "cancelled"}, expect={"status": "queued"}, events=[event])
    assert changed.status == "cancelled"
    assert store.get(Job, one.id) == changed
    assert [row.id for row in store.page(Event, Query("p", {"subject": one.id})).items] == [event.id]
    assert store.change(Job, "ft-none", {"status": "failed"}) is None


def test_jobs_are_claimed_by_priority_and_then_by_age(store):
    first, second = store.insert(job()), store.insert(job())
    urgent = store.insert(job(priority=5))
    store.insert(job(slots=4))
    store.insert(job(work="evaluate"))
    store.insert(job(status="validating"))
    claimed = [store.claim("w", work=["train"], slots=2, lost={}) for _ in range(4)]
    assert [one and one.id for one in claimed] == [urgent.id, first.id, second.id, None]
    assert (claimed[0].status, claimed[0].worker, claimed[0].attempt) == ("running", "w", 1)
    assert claimed[0].started_at is not None


def test_a_lost_job_is_claimed_again_and_its_old_worker_can_no_longer_write(store):
    store.insert(job())
    mine = store.claim("one", work=["train"], slots=1, lost={})
    mine = store.beat(mine)
    assert store.claim("two", work=["train"], slots=1, lost={mine.id: mine.beat - 1}) is None  # it has beaten since
    theirs = store.claim("two", work=["train"], slots=1, lost={mine.id: mine.beat})
    assert (theirs.id, theirs.attempt, theirs.worker) == (mine.id, 2, "two")
    for write in (lambda: store.beat(mine), lambda: store.write_as_worker(mine, {"progress": {"step": 9}})):
        with pytest.raises(LeaseLost):
            write()
    assert store.write_as_worker(theirs, {"progress": {"step": 1}}).progress == {"step": 1}
    done = store.write_as_worker(theirs, {"status": "succeeded"})
    with pytest.raises(LeaseLost):
        store.beat(done)


def test_a_worker_that_comes_back_under_its_name_does_not_own_the_old_attempt(store):
    store.insert(job())
    before = store.claim("w", work=["train"], slots=1, lost={})
    after = store.claim("w", work=["train"], slots=1, lost={before.id: before.beat})
    assert after.attempt == before.attempt + 1
    with pytest.raises(LeaseLost):
        store.beat(before)


def test_a_job_whose_workers_die_ends(store):
    store.insert(job(max_attempts=2))
    for _ in range(4):  # twice its attempts: a worker dies for reasons of its own too
        mine = store.claim("w", work=["train"], slots=1, lost={row.id: row.beat for row in store.page(Job, Query(None)).items})
    assert mine.attempt == 4
    assert store.claim("w", work=["train"], slots=1, lost={mine.id: 0}) is None
    ended = store.get(Job, mine.id)
    assert ended.status == "failed"
    assert ended.error["code"] == "worker_lost"
    assert ended.finished_at is not None


def test_many_claimers_never_share_a_job(store):
    ids = {store.insert(job()).id for _ in range(40)}
    got, lock = [], threading.Lock()

    def work(name):
        while (mine := store.claim(name, work=["train"], slots=1, lost={})) is not None:
            with lock:
                got.append(mine.id)

    threads = [threading.Thread(target=work, args=(f"w{index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(ids)


def test_concurrent_changes_are_not_lost(store):
    one = store.insert(job(progress={"n": 0}))

    def add(count):
        for _ in range(count):
            while True:
                before = store.get(Job, one.id)
                n = before.progress["n"]
                if store.change(Job, one.id, {"progress": {"n": n + 1}}, expect={"progress": {"n": n}}):
                    break

    threads = [threading.Thread(target=add, args=(10,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get(Job, one.id).progress == {"n": 30}


def test_a_dump_fills_an_empty_store_and_numbers_go_on(store, tmp_path):
    other = open_store(f"sqlite:///{tmp_path}/other.db")  # a dump is of no back end
    rows = [other.insert(job()) for _ in range(3)]
    other.change(Job, rows[1].id, {"deleted_at": now(), "metadata": {"a": "ä"}})
    other.insert(file("a"))
    dumped = list(other.dump())
    assert [row.kind for row in dumped] == ["files", "jobs", "jobs", "jobs"]
    assert store.load(dumped) == 4
    assert list(store.dump()) == dumped
    assert store.insert(job()).number == rows[-1].number + 1
    with pytest.raises(Conflict, match="not empty"):
        store.load(dumped)
    other.close()


def test_what_no_database_keeps_in_a_text_is_replaced_by_every_store(store):
    kept = store.insert(file("a\0b", report={"line\0": ["x\ud800"]}))
    assert store.get(File, kept.id) == kept
    assert (kept.filename, kept.report) == ("a\ufffdb", {"line\ufffd": ["x\ufffd"]})
    changed = store.change(File, kept.id, {"filename": "c\0"})
    assert store.get(File, kept.id).filename == changed.filename == "c\ufffd"
    for odd in ("file-\0", "\ud800"):
        assert store.get(File, odd) is None
        assert store.page(File, Query(None, {"purpose": odd}, after=None)).items == ()
        assert store.page(File, Query(None, after=odd)).items == ()
        assert store.change(File, odd, {"filename": "d"}) is None
    assert store.page(Job, Query(None, metadata={"a\0": "\ud800"})).items == ()
