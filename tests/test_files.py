"""Files that are whole or not there, digests that tell damage, locks that end with their process."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from sparse24.errors import Sparse24Error, Sparse24FileError
from sparse24.files import (
    DIGESTS,
    LOCK,
    check_seal,
    empty,
    locked,
    parse_json,
    remove_folder,
    remove_unfinished,
    seal,
    write_atomically,
    write_folder_atomically,
    write_text_atomically,
)

# -- writing ----------------------------------------------------------------------------------------------------------


def torch_save(path):
    torch.save({"x": torch.arange(5000)}, path)


def safetensors_save(path):
    from safetensors.torch import save_file

    save_file({"x": torch.arange(5000)}, path)


WRITERS = {"text": lambda path: path.write_text("x" * 40_000), "torch": torch_save, "safetensors": safetensors_save}


@pytest.mark.fault(62)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(writer, tmp_path, file_size_limit):
    """The kernel's own refusal (RLIMIT_FSIZE), in the form that each library gives it."""
    path = tmp_path / "file"
    path.write_text("old")
    with file_size_limit(10_000), pytest.raises(Sparse24FileError, match="file could not be written .* make room") as e:
        write_atomically(path, WRITERS[writer])
    assert isinstance(e.value, OSError) and isinstance(e.value, Sparse24Error)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, WRITERS[writer])
    assert path.stat().st_size > 10_000


@pytest.mark.fault(62)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_device_is_named_and_no_folder_is_left(writer, tmp_path):
    def write(folder):
        os.symlink("/dev/full", folder / "full")
        WRITERS[writer](folder / "full")

    if writer == "safetensors":  # it writes beside and renames, and so replaces the link
        pytest.skip("safetensors replaces links")
    with pytest.raises(Sparse24FileError, match="folder could not be written"):
        write_folder_atomically(tmp_path / "folder", write)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(62)
@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="no /proc, where nobody may make files")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_place_that_takes_no_files_is_not_called_full(writer):
    with pytest.raises(Sparse24FileError, match="could not be written .* name a place in a folder") as error:
        write_atomically("/proc/of-sparse24", WRITERS[writer])
    assert "full" not in str(error.value) and error.value.errno


def test_other_exceptions_pass_through(tmp_path):
    for error in (RuntimeError("of mine"), KeyboardInterrupt()):

        def write(path, error=error):
            path.write_text("half")
            raise error

        with pytest.raises(type(error)):
            write_atomically(tmp_path / "file", write)
        assert list(tmp_path.iterdir()) == []


def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    with pytest.raises(Sparse24FileError, match="is there and is not a plain file"):
        write_text_atomically(tmp_path, "x")
    with pytest.raises(Sparse24FileError, match="/dev/null is there"):
        write_text_atomically("/dev/null", "x")


def test_a_folder_that_is_missing_is_named_as_such(tmp_path):
    with pytest.raises(Sparse24FileError, match=r"no folder .*absent\); make the folder first"):
        write_atomically(tmp_path / "absent" / "file", lambda path: path.write_bytes(b""))


def test_temporary_names_cannot_be_guessed(tmp_path):
    names = set()
    for _ in range(20):
        write_atomically(tmp_path / "file", lambda path: names.add(path.name) or path.write_text("x"))
    assert len(names) == 20 and all(len(name.split("-")[-1]) >= 16 for name in names)


def test_bytes_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    """A power cut after the rename must find the data there, and the rename itself after it has been told of."""
    calls = []

    def watch(name, path_of):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args: calls.append((name, path_of(args[0]))) or original(*args))

    watch("fsync", lambda handle: os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".")[-1])
    watch("replace", lambda path: "tmp")
    watch("rename", lambda path: "tmp")
    write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
    assert calls == [("fsync", "tmp"), ("replace", "tmp")]
    calls.clear()
    write_folder_atomically(tmp_path / "folder", lambda path: [(path / name).write_text("x") for name in ("a", "b")])
    assert sorted(calls[:2]) == [("fsync", "a"), ("fsync", "b")]
    assert calls[2:] == [("fsync", "tmp"), ("rename", "tmp"), ("fsync", tmp_path.name)]


def test_what_killed_processes_left_goes_and_all_else_stays(tmp_path):
    for name in (".step-1.7-ab.tmp", ".other.7-ab.tmp", "step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".step-2.7-cd.tmp").write_text("half a file")
    remove_unfinished(tmp_path, "step-*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.7-ab.tmp", "step-1"]
    remove_folder(tmp_path / "step-1")
    assert [path.name for path in tmp_path.iterdir()] == [".other.7-ab.tmp"]
    remove_folder(tmp_path / "step-1")  # is gone already


def test_emptying_removes_links_and_not_what_they_point_to(tmp_path):
    kept, disk, folder = tmp_path / "kept", tmp_path / "disk", tmp_path / "folder"
    kept.mkdir(), disk.mkdir()
    (kept / "file").write_text("x")
    (disk / "link").symlink_to(kept)
    (disk / "file").write_text("x")
    folder.symlink_to(disk)
    empty(folder)
    assert list(disk.iterdir()) == [] and (kept / "file").read_text() == "x"
    disk.rmdir()
    empty(folder)  # a link to nothing
    assert folder.is_symlink()


@pytest.mark.fault(94)
def test_emptying_a_link_empties_what_it_points_to_and_keeps_the_link(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "folder"
    (disk / "step-1").mkdir(parents=True)
    (disk / "step-1" / "file").write_text("x")
    folder.symlink_to(disk)
    empty(folder)
    assert folder.is_symlink() and disk.is_dir() and list(disk.iterdir()) == []
    folder.unlink()
    empty(disk)
    assert not disk.exists()
    empty(disk)  # what is not there is empty


# -- digests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "b").write_bytes(b"")
    seal(tmp_path)
    return tmp_path


@pytest.mark.fault(47)
@pytest.mark.parametrize("size", [1, 2, 7, 64, 500])
def test_damage_of_every_size_anywhere_is_found(sealed, size):
    generator = torch.Generator().manual_seed(size)
    for name in ("a", DIGESTS):
        path = sealed / name
        whole = path.read_bytes()
        for _ in range(20):
            start = int(torch.randint(max(1, len(whole) - size), (), generator=generator))
            noise = bytes(torch.randint(1, 256, (min(size, len(whole)),), generator=generator).tolist())
            damaged = bytearray(whole)
            for offset, value in enumerate(noise):
                damaged[start + offset] ^= value
            path.write_bytes(damaged)
            with pytest.raises(Sparse24Error):
                check_seal(sealed)
        path.write_bytes(whole)
        check_seal(sealed)


@pytest.mark.fault(47)
def test_every_bit_of_the_list_of_digests_counts(sealed):
    path = sealed / DIGESTS
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(Sparse24Error):
                check_seal(sealed)


def test_files_that_come_or_go_are_told(sealed):
    (sealed / "b").unlink()
    with pytest.raises(Sparse24Error, match="'b' is missing"):
        check_seal(sealed)
    (sealed / "b").write_bytes(b"x")
    with pytest.raises(Sparse24Error, match="b is not the file that was written"):
        check_seal(sealed)
    (sealed / DIGESTS).unlink()
    with pytest.raises(Sparse24Error, match=rf"{DIGESTS} is missing; if you trust the files, \(cd .* sha256sum a b > "):
        check_seal(sealed)


def test_the_remedy_for_missing_digests_works(sealed):
    (sealed / DIGESTS).unlink()
    with pytest.raises(Sparse24Error) as error:
        check_seal(sealed)
    command = str(error.value).partition("trust the files, ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    check_seal(sealed)
    done = subprocess.run(["sha256sum", "-c", DIGESTS], cwd=sealed, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault(45)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00", "[]", "5", "", b"\xff\xfe{", "{"])
def test_hostile_json_is_a_named_error(text):
    with pytest.raises(Sparse24Error, match="the header is not"):
        parse_json(text, "the header")


# -- locks ------------------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from sparse24.files import locked\nwith locked(Path(sys.argv[1])): "


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    code = HOLD + "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.fault(93)
def test_a_folder_in_use_names_the_process(tmp_path, holder):
    pid = f"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(Sparse24Error, match=rf"is in use by {pid}; .*\(kill {holder.pid}\), or name"):
        with locked(tmp_path):
            pass
    assert holder.poll() is None and (tmp_path / LOCK).exists()


@pytest.mark.fault(93)
def test_the_lock_of_a_killed_process_locks_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} ")
    assert not (tmp_path / LOCK).exists()


def test_a_lock_file_with_anything_in_it_locks_nothing(tmp_path):
    for text in (f"{os.getppid()} {socket.gethostname()}", "9" * 50, "\x00\xff", ""):  # a pid may have a new owner
        (tmp_path / LOCK).write_text(text)
        with locked(tmp_path):
            pass


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(Sparse24FileError, match="cannot be opened .* remove it"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_of_many_threads_one_at_a_time_holds_a_folder(tmp_path):
    inside, most, entered = [], [], []

    def work():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                with locked(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.002)
                    inside.pop()
                entered.append(1)
                return
            except Sparse24Error:
                time.sleep(0.001)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 8 and max(most) == 1


@pytest.mark.parametrize(
    "owner, free",
    [(f"{os.getpid()} here", False), ("999999999 here", True), ("", True)],
    ids=["alive", "gone", "nobody"],  # fixed names: workers of pytest-xdist compare them
)
def test_without_flock_the_process_in_the_file_decides(tmp_path, monkeypatch, owner, free):
    import fcntl

    def no_flock(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    (tmp_path / LOCK).write_text(owner)
    if free:
        with locked(tmp_path):
            pass
        return
    with pytest.raises(Sparse24Error, match=f"in use by process {os.getpid()} on here; .*remove .*{LOCK}"):
        with locked(tmp_path):
            pass
