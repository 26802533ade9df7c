"""A start, and memory over many clips, at a small size: python -m agrepa_fast.bench.scale measures large ones."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from agrepa_fast.bench import scale
from agrepa_fast.data import threads
from agrepa_fast.data.manifest import read_manifest
from agrepa_fast.data.threads import many_objects, threaded
from agrepa_fast.training.identity import file_digest, identify


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("AGREPA_CACHE", str(tmp_path / "cache"))


def test_memory_is_flat_over_the_clips(tmp_path):
    measured = scale.memory(tmp_path, 400)
    extraction, training = measured["extraction"], measured["training"]
    assert extraction["end"] < 1.05 * extraction["quarter"]
    assert training["end"] < 1.05 * training["half"]


def test_a_later_start_reads_no_header(tmp_path, monkeypatch):
    from agrepa_fast.data import sounds

    read = []
    original = sounds.read_header
    monkeypatch.setattr(sounds, "read_header", lambda *a: read.append(a) or original(*a))
    seconds = scale.start(tmp_path, 200)
    assert len(read) == 200
    assert set(seconds) == {"first", "later"}


def test_the_generated_clips_are_different(tmp_path):
    known = identify(read_manifest(scale.write_clips(tmp_path, 300)))
    assert len({k.identity.sound for k in known}) == 300
    assert {k.clip.domain for k in known} == {"speech", "audio"}


def test_identities_do_not_depend_on_links(tmp_path):
    """The folders' real paths are looked up once for each folder; a clip that is a link is that of its file."""
    listed = scale.write_clips(tmp_path / "a", 3)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    plain, through = identify(read_manifest(listed)), identify(read_manifest(tmp_path / "b" / "list.csv"))
    assert [k.identity for k in plain] == [k.identity for k in through]
    first, second = (tmp_path / "a" / "000" / f"00000{n}.wav" for n in (0, 1))
    second.unlink()
    second.symlink_to(first)
    linked = identify(read_manifest(listed))
    assert linked[1].identity.place == linked[0].identity.place == plain[0].identity.place
    assert linked[2].identity == plain[2].identity
    assert os.path.realpath(second) == os.path.realpath(first)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
def test_threads_keep_the_order(count):
    assert list(threaded(lambda item: item * item, range(count), 4)) == [item * item for item in range(count)]


@pytest.mark.parametrize(("busy", "expected"), [(1.0, 1), (0.3, 3), (0.01, 8), (0.0, 8)])
def test_threads_are_for_waiting(monkeypatch, busy, expected):
    """The first items take a second, of which the processor works so long."""
    clock = SimpleNamespace(perf_counter=iter([0.0, 1.0]).__next__, thread_time=iter([0.0, busy]).__next__)
    monkeypatch.setattr(threads, "time", clock)
    pools = []

    def pool(size: int) -> ThreadPoolExecutor:
        pools.append(size)
        return ThreadPoolExecutor(size)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", pool)
    assert list(threads.threaded(str, range(200), 8)) == [str(item) for item in range(200)]
    assert pools == [expected]


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(threaded(lambda item: 1 // item, [1, 0], 2))


def test_garbage_is_collected_again_afterwards():
    inside = []
    with many_objects():
        inside.append(gc.isenabled())
    assert inside == [False]
    assert gc.isenabled()


def test_the_digest_of_what_is_no_file_waits_for_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody writes into it
    digests = [file_digest(tmp_path / name) for name in ("pipe", "missing", ".")]
    assert len(set(digests)) == 3
