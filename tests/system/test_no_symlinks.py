"""What is written below a root: through no link, and into nothing that has other names."""

import os
import socket

import pytest

from mmcache.errors import CorruptError, LinkError, WriteError
from mmcache.system import no_symlinks
from mmcache.system.atomic import AtomicFile, publish, publish_all, remove_drafts
from mmcache.system.files import make_folder, make_folders, remove_file, set_aside
from mmcache.system.locks import FolderLock, locked
from mmcache.system.no_symlinks import check_links, check_path, make_empty, open_in_place, opened_folder, opened_parent
from stores_and_processes import file_descriptors, path_at


@pytest.fixture
def root(tmp_path):
    """A folder with another one in it, beside a folder of the user's with a file in it."""
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "mine" / "x").mkdir(parents=True)
    (tmp_path / "mine" / "file").write_text("precious")
    return tmp_path / "root"


@pytest.fixture(params=[True, False], ids=["no follow", "portable"])
def system(request, monkeypatch):
    """A system whose `open` can be told to follow no link, and one that knows no such thing."""
    if not request.param:
        monkeypatch.setattr(no_symlinks, "NO_FOLLOW", 0)
    elif not no_symlinks.NO_FOLLOW:
        pytest.skip("this system has no O_NOFOLLOW")


def mine(root):
    """Everything that tells whether the user's folder was touched."""
    found = {}
    for path in sorted([root.parent / "mine", *(root.parent / "mine").rglob("*")]):
        status = path.lstat()
        found[path] = (status.st_mtime_ns, status.st_ctime_ns, status.st_nlink, status.st_mode, status.st_size)
    return found


def plant(kind, place):
    """Put something in the place of a file that is written in place."""
    mine = next(path for path in place.parents if path.name == "root").parent / "mine"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()  # noqa: PTH109 -- a socket's address is short
            os.chdir(place.parent)
            opened.bind(place.name)
            os.chdir(here)
        return
    {
        "link to a file": lambda: place.symlink_to(mine / "file"),
        "link to a folder": lambda: place.symlink_to(mine),
        "link to nothing": lambda: place.symlink_to(mine / "nothing"),
        "link to itself": lambda: place.symlink_to(place.name),
        "second name": lambda: os.link(mine / "file", place),
        "pipe": lambda: os.mkfifo(place),
        "folder": place.mkdir,
    }[kind]()


LINKS = ["link to a file", "link to a folder", "link to nothing", "link to itself", "second name"]
KINDS = [*LINKS, "pipe", "socket", "folder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("system")
def test_only_a_plain_file_of_one_name_is_written_in_place(root, kind):
    plant(kind, root / "inner" / "file")
    before, open_before = mine(root), file_descriptors()
    for flags in (os.O_RDWR, os.O_RDWR | os.O_CREAT):
        with pytest.raises(CorruptError, match="inner/file") as refused:
            open_in_place(root, "inner/file", flags)
        assert isinstance(refused.value, LinkError) == (kind in LINKS)
    assert mine(root) == before
    assert file_descriptors() == open_before


@pytest.mark.usefixtures("system")
def test_a_file_that_is_written_in_place_is_made_only_if_asked_for(root):
    with pytest.raises(FileNotFoundError):
        open_in_place(root, "inner/file", os.O_RDWR)
    for text in (b"one", b"two"):
        fd = open_in_place(root, "inner/file", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, text, 0)
        os.close(fd)
        assert (root / "inner" / "file").read_bytes() == text


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
@pytest.mark.usefixtures("system")
def test_a_link_that_comes_between_the_look_and_the_opening_is_not_followed(root, monkeypatch, there):
    place, real, looks = root / "inner" / "lock", os.open, []
    if there:
        place.touch()

    def swapped(path, flags, *mode, **options):
        if path == "lock" and not looks:
            looks.append(path)
            place.unlink(missing_ok=True)
            place.symlink_to(root.parent / "mine" / ("file" if there else "nothing"))
        return real(path, flags, *mode, **options)

    before = mine(root)
    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(LinkError, match=r"inner/lock (is a symbolic link to '.*mine|was replaced)"):
        open_in_place(root, "inner/lock", os.O_RDWR | os.O_CREAT)
    assert looks
    assert mine(root) == before


WRITES = {
    "publish": lambda root: publish(root, "inner/file", b"x"),
    "publish_all": lambda root: publish_all(root, {"inner/file": b"x", "inner/deep/file": b"y"}),
    "draft": lambda root: AtomicFile(root, "inner/file"),
    "remove_drafts": lambda root: remove_drafts(root, "inner"),
    "remove_file": lambda root: remove_file(root, "inner/file"),
    "make_folder": lambda root: make_folder(root, "inner/new"),
    "make_folder, there": lambda root: make_folder(root, "inner/x"),
    "make_folder, itself": lambda root: make_folder(root, "inner"),
    "make_folders": lambda root: make_folders(root, ["a", "inner/new/deep"]),
    "make_empty": lambda root: make_empty(root, "inner", ["new"]),
    "set_aside": lambda root: set_aside(root, "inner/file", "aside"),
    "set_aside into": lambda root: set_aside(root, "own", "inner/x"),
    "locked": lambda root: locked(root, "inner/lock").__enter__(),
    "check_links": lambda root: check_links(root, ["none", "inner"]),
    "check_path": lambda root: check_path(root, "inner/x/none"),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("aim", ["../mine", "inner", "nothing"])
@pytest.mark.usefixtures("system")
def test_nothing_is_written_or_moved_or_removed_through_a_linked_folder(root, write, aim):
    (root / "inner").rmdir()
    (root / "inner").symlink_to(aim)
    (root / "own").touch()
    before, open_before = mine(root), file_descriptors()
    with pytest.raises(
        LinkError, match=rf"root/inner is a symbolic link to '{aim}', and .* mount the other disk there"
    ):
        write(root)
    assert mine(root) == before
    assert file_descriptors() == open_before


def test_a_root_may_be_reached_through_links(root):
    (root.parent / "way").symlink_to(root)
    way = root.parent / "way"
    publish(way, "inner/file", b"x")
    publish_all(way, {"inner/other": b"y", "z": b"z"})
    make_folder(way, "inner/a/b")
    check_links(way, ["inner"])
    FolderLock(way).release()
    assert set_aside(way, "inner/file", "aside") == "aside/file.1"
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == [
        "aside", "aside/file.1", "inner", "inner/a", "inner/a/b", "inner/other", "z",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["", "..", ".", "../mine/file", "inner/..", "inner/../../mine/file", "inner//file", "a/."]
)
def test_a_name_that_leads_elsewhere_is_no_name(root, name):
    before = mine(root)
    for write in (
        lambda: remove_file(root, name),
        lambda: publish(root, name, b"x"),
        lambda: locked(root, name).__enter__(),
    ):
        with pytest.raises(CorruptError, match="no name of ours"):
            write()
    assert mine(root) == before


def test_a_folder_that_becomes_a_link_while_a_file_is_written_gets_none(root):
    draft = AtomicFile(root, "inner/file", reserve=1 << 20)
    (root / "inner").rename(root / "moved")
    (root / "inner").symlink_to("../mine/x")
    before = mine(root)
    with pytest.raises(LinkError, match="root/inner"):
        draft.publish(3)
    draft.discard()
    assert mine(root) == before
    assert [path.name for path in (root / "moved").iterdir()] == [draft._temporary]


def test_a_temporary_file_that_is_replaced_is_not_opened_a_second_time(root):
    draft = AtomicFile(root, "file")
    temporary = root / draft._temporary
    temporary.unlink()
    temporary.symlink_to("../mine/file")
    with pytest.raises(OSError, match=r"Too many levels|No such file"):
        draft._open_again(os.O_WRONLY)
    temporary.unlink()
    temporary.write_text("another")
    with pytest.raises(FileNotFoundError):
        draft._open_again(os.O_WRONLY)
    draft.discard()


def test_a_link_in_the_place_of_a_file_is_replaced_or_removed_itself(root):
    before = mine(root)
    for number, aim in enumerate(("../mine/file", "../mine", "nothing")):
        place = root / f"file{number}"
        place.symlink_to(aim)
        publish(root, place.name, b"x")
        assert not place.is_symlink()
        assert place.read_bytes() == b"x"
        place.unlink()
        place.symlink_to(aim)
        remove_file(root, place.name)
    assert sorted(path.name for path in root.iterdir()) == ["inner"]
    # The time of what a folder's name leads to is none of its own.
    assert mine(root) == before


def test_links_are_found_wherever_a_writer_comes_and_nowhere_else(root):
    deep = root / "inner" / "a" / "b"
    deep.mkdir(parents=True)
    (root / "notes").symlink_to("../mine")
    check_links(root, ["inner", "none"])
    for place in (root / "inner" / "file", deep / "file"):
        place.symlink_to("nothing")
        with pytest.raises(LinkError, match=rf"{place} is a symbolic link to 'nothing'"):
            check_links(root, ["inner", "none"])
        place.unlink()
    with pytest.raises(LinkError, match="root/notes"):
        check_links(root, ["notes"])


def test_a_folder_is_opened_from_within_the_one_above(root):
    with opened_folder(root, "inner") as fd:
        assert path_at(fd) == root / "inner"
    with opened_parent(root, "inner/file") as (fd, last):
        assert (path_at(fd), last) == (root / "inner", "file")
    with pytest.raises(NotADirectoryError), opened_folder(root.parent / "mine", "file"):
        pass
    with pytest.raises(FileNotFoundError), opened_folder(root, "none"):
        pass
    (root / "file").touch()
    with pytest.raises(WriteError, match="making the folder"):
        make_folder(root, "file/inner")
