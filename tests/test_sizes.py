"""pick_size: which size a machine takes, with a GPU, its memory and its compute capability faked."""

import pytest
import torch

from siglip_lib import pick_size
from siglip_lib.base.offers import compiles_for, pick_dtype
from siglip_lib.kernels.device import check_device

GIB = 2**30


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("SIGLIP_SIZE", raising=False)
    monkeypatch.delenv("SIGLIP_GPU_GIB", raising=False)
    compiles_for.cache_clear()
    yield
    compiles_for.cache_clear()


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Make torch tell of a GPU; returns a list of the memory fractions that are set."""
    fractions = []

    def fake(free, total=None, capability=(8, 6), held=0.0):
        compiles_for.cache_clear()
        values = int(free * GIB), int((total or free + held) * GIB)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: values)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: int(held * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, device=None: fractions.append(fraction),
        )
        return fractions

    return fake


def test_without_a_gpu_the_size_is_cpu(no_gpu):
    size = pick_size()
    assert (size.name, size.device, size.dtype) == ("cpu", torch.device("cpu"), torch.float32)
    assert not size.on_gpu
    assert str(size) == "size: cpu in float32; torch sees no CUDA GPU"


@pytest.mark.parametrize(
    ("free", "name"),
    [(5.99, "cpu"), (6, "lab"), (11.6, "lab"), (59.9, "lab"), (60, "full"), (139, "full")],
)
def test_what_is_free_decides(free, name, fake_gpu):
    fake_gpu(free)
    size = pick_size()
    assert size.name == name
    assert size.device.type == ("cpu" if name == "cpu" else "cuda")
    assert f"{free:.1f} GiB of the GPU are free" in str(size)


def test_memory_of_this_process_counts_as_free(fake_gpu):
    fake_gpu(3, held=4)  # a notebook's first cell, run a second time
    assert pick_size().name == "lab"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)],
)
def test_bfloat16_where_it_is_native(capability, dtype, fake_gpu):
    fake_gpu(15, capability=capability)
    assert pick_size().dtype == dtype == pick_dtype(torch.device("cuda", 0))


def test_kernels_of_a_gpu_that_triton_has_no_compiler_for_run_on_the_cpu(fake_gpu):
    fake_gpu(15, capability=(7, 5))
    assert pick_size().name == "lab"
    size = pick_size(kernels=True)
    assert (size.name, size.device.type) == ("cpu", "cpu")
    assert "compiles for compute capability 8.0 and newer, this GPU has 7.5" in str(size)
    fake_gpu(15, capability=(8, 0))
    assert pick_size(kernels=True).name == "lab"


def test_a_kernel_says_which_gpu_it_needs(fake_gpu):
    fake_gpu(15, capability=(7, 5))
    assert not compiles_for(0)

    class OnGpu:
        is_cuda, device = True, 0

    with pytest.raises(ValueError, match=r"^x is on a GPU of compute capability 7\.5; .*; use y$"):
        check_device("x", OnGpu, None, "use y")


def test_a_cap_leaves_room_for_what_cuda_takes_beside_torch(monkeypatch, fake_gpu):
    fractions = fake_gpu(100, total=140)
    monkeypatch.setenv("SIGLIP_GPU_GIB", "8")
    size = pick_size()
    assert (size.name, size.room, size.free) == ("lab", 8 * GIB, 7 * GIB)
    assert fractions == [7 / 140]  # torch may take what the notebooks see, and no more
    words = "SIGLIP_GPU_GIB caps this process at 8.0 GiB of the GPU, 7.0 of them for torch"
    assert f"; {words} (6 are enough for this size, 60 for the next)" in str(size)


@pytest.mark.parametrize(
    ("free", "held", "cap", "name", "room"),
    [
        (20, 0, 6, "lab", 6),
        (6, 0, 6, "lab", 6),
        (5.5, 0, 6, "cpu", 0),  # neighbours have the rest
        (6.5, 0, 8, "lab", 6.5),
        (3, 4, 6, "lab", 6),  # of 7 that are free or held by this process itself
        (3, 3.5, 8, "lab", 6.5),
        (23, 0, 5.9, "cpu", 0),
        (23, 0, 40, "lab", 23),  # a cap above the whole GPU
    ],
)
def test_neighbours_may_leave_less_than_the_cap(free, held, cap, name, room, monkeypatch, fake_gpu):
    fractions = fake_gpu(free, total=24, held=held)
    monkeypatch.setenv("SIGLIP_GPU_GIB", str(cap))
    size = pick_size()
    assert (size.name, size.room) == (name, room * GIB)
    assert size.free == max(size.room - GIB, 0)
    assert fractions == [pytest.approx(min(1, (cap - 1) / 24))]  # neighbours may leave again
    binds = cap <= free + held
    assert ("SIGLIP_GPU_GIB caps this process" in str(size)) == binds
    assert (f"{free + held:.1f} GiB of the GPU are free" in str(size)) != binds


def test_a_cap_below_what_cuda_takes_leaves_torch_nothing(monkeypatch, fake_gpu):
    fractions = fake_gpu(20)
    monkeypatch.setenv("SIGLIP_GPU_GIB", "0.5")
    assert pick_size().name == "cpu"
    assert fractions == [0]


def test_a_forced_size_above_the_cap_names_the_cap(monkeypatch, fake_gpu):
    fake_gpu(20)
    monkeypatch.setenv("SIGLIP_SIZE", "lab")
    monkeypatch.setenv("SIGLIP_GPU_GIB", "5")
    capped = "SIGLIP_GPU_GIB caps this process at 5.0 GiB of the GPU, 4.0 of them for torch"
    with pytest.raises(ValueError, match=f"^SIGLIP_SIZE=lab needs 6 GiB of the GPU; {capped}$"):
        pick_size()


@pytest.mark.parametrize("text", ["0", "-3", "many", "nan", "inf"])
def test_a_cap_that_is_no_number_is_refused_before_it_is_set(text, monkeypatch, fake_gpu):
    fractions = fake_gpu(100)
    monkeypatch.setenv("SIGLIP_GPU_GIB", text)
    with pytest.raises(ValueError, match=f"SIGLIP_GPU_GIB={text} must be a number of GiB above 0"):
        pick_size()
    assert not fractions


def test_a_size_can_be_forced(monkeypatch, fake_gpu):
    fake_gpu(100)
    for name in ("cpu", "lab", "full"):
        monkeypatch.setenv("SIGLIP_SIZE", name)
        size = pick_size()
        assert size.name == name
        assert size.device.type == ("cpu" if name == "cpu" else "cuda")
        assert f"SIGLIP_SIZE={name}" in str(size)


@pytest.mark.parametrize(("name", "free", "least"), [("full", 22, 60), ("lab", 5, 6)])
def test_a_forced_size_that_does_not_fit_names_the_memory(name, free, least, monkeypatch, fake_gpu):
    fake_gpu(free)
    monkeypatch.setenv("SIGLIP_SIZE", name)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below
        pick_size()
    given = f"SIGLIP_SIZE={name} needs {least} GiB of the GPU"
    assert str(caught.value) == f"{given}; {free}.0 GiB of the GPU are free"


def test_an_unknown_size_is_refused(monkeypatch, no_gpu):
    monkeypatch.setenv("SIGLIP_SIZE", "huge")
    with pytest.raises(ValueError, match="SIGLIP_SIZE=huge is none of cpu, lab, full"):
        pick_size()


def test_values_for_each_size(monkeypatch, fake_gpu):
    found = []
    for free in (1, 8, 100):
        fake_gpu(free)
        size = pick_size()
        found.append((size.pick(cpu=1, lab=2, full=3), size.pick(cpu=1, lab=2)))
    assert found == [(1, 1), (2, 2), (3, 2)]


@pytest.mark.parametrize(("each", "wanted"), [(6 / 64, 64), (0.1, 8), (0.75, 8), (0.8, 1), (7, 1)])
def test_the_largest_batch_that_fits(each, wanted, fake_gpu):
    fake_gpu(9)  # of which torch gets 8, and 6 are taken
    assert pick_size().largest((1, 8, 64), each * GIB) == wanted


def test_a_size_on_this_machine(device):
    size = pick_size()
    assert torch.empty(0, device=size.device, dtype=size.dtype).device == size.device
    assert size.on_gpu == (size.device.type == "cuda")
