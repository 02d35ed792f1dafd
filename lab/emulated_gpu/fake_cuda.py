"""A CUDA device without numbers, on a build of torch for the CPU: a card of a chosen size and compute capability.

Tensors on the device have a shape, a dtype and a place, and no values (torch's fake tensors); those on the CPU are real, so
that files are read and written as ever. What comes back from the device is 0 (an int: -1, a bool: True). The card counts
what is alive as CUDA's allocator does, runs out of memory where a card of that size would, knows which operations and which
copies between host and device were asked for, and has streams that do not advance before somebody waits for them.

torch's autograd engine looks for devices once, at its first backward pass, so a small library that registers one has to be
loaded before. In a process that imports this module before torch (`fake_process` in lab/emulated_gpu/conftest.py) it is, and
`fake_cuda` works.
"""

import ctypes
import gc
import hashlib
import importlib.util
import os
import subprocess
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

DEVICE_GUARD = r"""
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return c10::Device(c10::DeviceType::CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Generator final : at::CPUGeneratorImpl {
  Generator() { device_ = c10::Device(c10::DeviceType::CUDA, 0); }
};

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  at::Generator getNewGenerator(DeviceIndex) const override { return make_generator<::Generator>(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}

c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard());

// The kind of attention that torch chooses: flash (1) for 16 bits from capability 8.0 on, without a mask; else memory-efficient
// (2), which has bf16 from 8.0 on too; else the plain one (0).
int capability_major = 9;
extern "C" void set_capability(int major) { capability_major = major; }

namespace at::native {
int64_t choice(const Tensor& query, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
               std::optional<double>, bool) {
  bool narrow = query.scalar_type() == kHalf || query.scalar_type() == kBFloat16;
  if (narrow && !mask.has_value() && capability_major >= 8 && query.size(-1) <= 256) return 1;
  return query.scalar_type() == kBFloat16 && capability_major < 8 ? 0 : 2;
}
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choice)
}
"""
LIBRARIES = Path(__file__).parents[2] / "tests" / ".downloads"


def _loaded_library() -> ctypes.CDLL:
    """The library, compiled once for each torch: it knows where that one's own libraries are."""
    found = importlib.util.find_spec("torch")
    assert found and found.origin
    home = Path(found.origin).resolve().parent
    version = (home / "version.py").read_text()
    key = hashlib.sha256(f"{home} {version} {DEVICE_GUARD}".encode()).hexdigest()
    library = LIBRARIES / f"fake_cuda-{key[:12]}.so"
    if not library.exists():
        LIBRARIES.mkdir(exist_ok=True)
        source, built = (library.with_suffix(f".{os.getpid()}{ending}") for ending in (".cpp", ".so"))
        source.write_text(DEVICE_GUARD)
        options = [
            "-O0",
            "-std=c++20",
            "-fPIC",
            "-shared",
            f"-I{home}/include",
            f"-L{home}/lib",
            f"-Wl,-rpath,{home}/lib",
        ]
        subprocess.run(["g++", *options, source, "-o", built, "-lc10", "-ltorch_cpu"], check=True)
        built.replace(library)  # whole or not at all: another process may be at it too
        source.unlink()
    return ctypes.CDLL(str(library))


_LIBRARY = None if "torch" in sys.modules else _loaded_library()

import torch  # noqa: E402
import torch.utils._foreach_utils as foreach_utils  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten: Any = torch.ops.aten
Tensor_data: Any = Tensor.data
DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
GIB = 2**30
GRAIN = 512
"""The bytes that CUDA's allocator rounds every size up to a multiple of."""
PRODUCTS = (
    aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.convolution, aten.convolution_backward,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention, aten._int_mm, aten._scaled_mm,
)  # fmt: skip
"""The operations whose dtypes decide about speed."""
KERNELS = (aten.silu_backward.default, *([aten._fused_rms_norm.default] if hasattr(aten, "_fused_rms_norm") else []))
"""Operations that are one kernel on CUDA, and which a build for the CPU would take apart for want of it."""
OutOfMemoryForm = Literal["allocator", "driver", "cublas", "cudnn", "cudnn GET", "cudnn FIND"]
MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "allocator": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate {size} bytes."),
    "driver": (RuntimeError, "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    "cublas": (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn GET": (RuntimeError, "GET was unable to find an engine to execute this computation"),
    "cudnn FIND": (RuntimeError, "FIND was unable to find an engine to execute this computation"),
}
"""The error that each form of a lack of memory is."""


if _LIBRARY:
    _REGISTERED = torch.library.Library("aten", "IMPL")
    for _kernel in KERNELS:
        _REGISTERED.impl(_kernel, lambda *_: None, "CUDA")  # never called: the card answers before


@dataclass(frozen=True)
class Copy:
    """A copy between host and device."""

    direction: Literal["to device", "to host", "read"]
    """"read" is a single number, for which the host waits."""
    size: int
    place: str
    """The file and the function of the project that asked for it."""
    pinned: bool
    """Whether the host's memory is page-locked, so that the device copies by itself and the host need not wait."""


@dataclass
class Stream:
    """A queue of work. It gets nothing done before somebody waits: `asked` counts what was asked for, `done` what is done."""

    device: Any = None
    asked: int = 0
    done: int = 0

    def wait_stream(self, other: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.done = self.asked


class Event:
    """A place in a stream."""

    def __init__(self, **_: object):
        self.stream, self.place = Stream(), 0

    def record(self, stream: Stream | None = None) -> None:
        current: Any = torch.cuda.current_stream()
        self.stream = stream or current
        self.place = self.stream.asked

    def query(self) -> bool:
        return self.stream.done >= self.place

    def synchronize(self) -> None:
        self.stream.done = max(self.stream.done, self.place)


@dataclass
class Held:
    """What CUDA's allocator may not use again before a stream has come to a place, though nothing refers to it."""

    size: int
    stream: Stream
    place: int


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments or results of an operation, those in lists too."""
    found: list[Tensor] = []
    for given in (*args, *kwargs.values()):
        if isinstance(given, Tensor):
            found.append(given)
        elif isinstance(given, list | tuple):
            found += _tensors(given, {})
    return found


class Card(TorchDispatchMode):
    """The device: what is alive on it, and what it was asked for since `watch` was called."""

    most_pinned: float = float("inf")
    """The bytes of page-locked memory that the system has."""

    def __init__(self, size: float = 80, capability: tuple[int, int] = (9, 0)):
        """Takes the memory in GiB and the compute capability."""
        super().__init__()
        self.total, self.capability = int(size * GIB), capability
        self.unpinned = 0
        """The bytes of page-locked memory that torch keeps although nothing uses them any more."""
        self.workspace: str | None = None
        """The setting of cuBLAS, which it reads at its first product."""
        self.refused: frozenset[torch.dtype] = frozenset()
        """Dtypes that the device does not have."""
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = self.pinned = 0
        self.share: float | None = None
        """The share of the memory that the process has bounded itself to."""
        self.compute = self.current = Stream()
        self.early = 0
        """How many tensors were given back to the stream that they were made in, before another one was done with them."""
        self.fails_at: int | None = None
        """The number of an allocation, counted by `allocations`, that fails; None: none fails unless the card is full."""
        self.form: OutOfMemoryForm = "allocator"
        self._storages: set[int] = set()
        self._pinned: set[int] = set()
        self._recorded: dict[int, Stream] = {}
        self._used: dict[int, tuple[Stream, Stream, int]] = {}
        """The stream of each storage that was made beside the compute stream, and its last use in another one."""
        self._held: deque[Held] = deque()
        self.watch()

    def watch(self) -> None:
        """Begins anew to note what is asked for."""
        self.allocations = self.launches = 0
        self.copies: list[Copy] = []
        self.products: Counter[tuple[str, tuple[torch.dtype, ...]]] = Counter()
        self.converted = 0
        """Bytes that the processor converts to another dtype, as torch does where it copies and converts in one call."""
        self.rounded = 0
        """Convolutions in float32 whose inputs were rounded to TF32."""
        self.peak = self.live

    def product_dtypes(self) -> set[torch.dtype]:
        """The dtypes of the operands of all products that were asked for."""
        return {dtype for _, dtypes in self.products for dtype in dtypes}

    def waits(self) -> list[Copy]:
        """The copies for which the host waits."""
        return [copy for copy in self.copies if copy.direction != "to device"]

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        fakes = [tensor for tensor in _tensors(args, kwargs) if isinstance(tensor, FakeTensor)]
        other = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        if other is not None or any(tensor.fake_mode is not self.fake for tensor in fakes):  # of a prediction of memory
            return func(*args, **kwargs)
        device = next((given for given in (*args, *kwargs.values()) if isinstance(given, torch.device)), None)
        place = None if device is None else device.type
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
            result = func(*args, **kwargs)
            self._pin(result)
            return result
        if not fakes and place != "cuda":
            return func(*args, **kwargs)
        if func not in KERNELS and func._can_decompose():  # in inference mode nothing has done that before
            with self:
                if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return result
        if func is aten._local_scalar_dense.default:
            return self._read(args[0])
        if func is aten._linalg_check_errors.default:
            self._read(args[0])
            return None
        if func is aten._to_copy.default and (place is not None and place != args[0].device.type):
            return self._copied(args[0], place, kwargs)
        if func is aten.copy_.default and args[0].device.type != args[1].device.type:
            self._note("to device" if args[0].device.type == "cuda" else "to host", args[1])
            return args[0] if args[0].device.type == "cuda" else args[0].zero_()
        return self._on_device(func, args, kwargs)

    def _on_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in (aten.index.Tensor, aten.index_put_.default):  # indices of the host are copied
            for index in args[1]:
                if isinstance(index, Tensor) and not isinstance(index, FakeTensor):
                    self._note("to device", index)
        packet = func.overloadpacket
        if packet in PRODUCTS:
            dtypes = tuple(tensor.dtype for tensor in _tensors(args, {}))
            self.products[str(packet), dtypes] += 1
            self._check_determinism(packet)
            if packet in (aten._int_mm, aten._scaled_mm):
                self._check_eight_bits(packet, *args[:2])
            is_convolution = packet in (aten.convolution, aten.convolution_backward)
            self.rounded += is_convolution and torch.float32 in dtypes and torch.backends.cudnn.allow_tf32
        no_kernel = ("aten::empty", "aten::_unsafe_view", "aten::new_empty")
        if not func.is_view and not func.name().startswith(no_kernel):
            self.launch()
        self._settle()
        for tensor in _tensors(args, kwargs) if self._used else ():
            made_in, *_ = self._used.get(place := tensor.untyped_storage()._cdata, (self.current,))
            if made_in is not self.current:
                self._used[place] = made_in, self.current, self.current.asked
        with self.fake:
            result = func(*args, **kwargs)
        for tensor in _tensors((result,), {}):
            if isinstance(tensor, FakeTensor):
                self._count(tensor)
        return result

    def _check_determinism(self, packet: Any) -> None:
        if packet not in (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm):
            return
        if self.workspace is None:
            self.workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
        if torch.are_deterministic_algorithms_enabled() and self.workspace not in (":4096:8", ":16:8"):
            raise RuntimeError(
                "Deterministic behavior was enabled with `torch.use_deterministic_algorithms(True)`, but this operation is not "
                "deterministic because it uses CuBLAS and you have CUDA >= 10.2."
            )

    def _check_eight_bits(self, packet: Any, left: Tensor, right: Tensor) -> None:
        """What torch requires of products in 8 bits on CUDA."""
        multiple = 8 if packet is aten._int_mm else 16
        if any(side % multiple for side in right.shape):
            raise RuntimeError(
                f"Expected the second matrix's sides to be multiples of {multiple}: {tuple(right.shape)}"
            )
        if packet is aten._int_mm and len(left) <= 16:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {len(left)}")
        if packet is aten._scaled_mm and self.capability < (8, 9):
            raise RuntimeError("torch._scaled_mm requires compute capability >= 8.9")
        if right.stride(0) != 1:  # which some GPUs have products of, and others don't (pytorch#169956)
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmulAlgoGetHeuristic")

    def launch(self) -> None:
        self.launches += 1
        self.current.asked += 1

    def _read(self, tensor: Tensor) -> Any:
        self._note("read", tensor)
        self.synchronize()
        return True if tensor.dtype == torch.bool else 0.0 if tensor.dtype.is_floating_point else -1

    def _copied(self, tensor: Tensor, place: str, kwargs: Any) -> Tensor:
        dtype = kwargs.get("dtype") or tensor.dtype
        if place == "cpu":
            self._note("to host", tensor)
            self.synchronize()
            return torch.zeros(tensor.shape, dtype=dtype)
        self._note("to device", tensor)
        self.converted += tensor.nbytes * (dtype != tensor.dtype)
        self.current.asked += 1
        self._settle()
        with self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=DEVICE)
        self._count(made)  # pyright: ignore
        return made

    def _note(self, direction: Any, tensor: Tensor) -> None:
        frame, place = sys._getframe(), "outside"
        while frame := frame.f_back:
            if "/core/" in frame.f_code.co_filename and "site-packages" not in frame.f_code.co_filename:
                place = f"{frame.f_code.co_filename.rpartition('/core/')[2]}:{frame.f_code.co_name}"
                break
        pinned = tensor.untyped_storage()._cdata in self._pinned
        self.copies.append(Copy(direction, tensor.numel() * tensor.dtype.itemsize, place, pinned))

    def _pin(self, tensor: Tensor) -> None:
        """Counts page-locked memory as torch takes it: a power of two."""
        size = 1 << max(0, tensor.untyped_storage().nbytes() - 1).bit_length()
        if self.pinned + size > self.most_pinned:
            raise RuntimeError("CUDA error: out of memory")
        self.unpinned -= min(size, self.unpinned)
        self.pinned += size
        place = tensor.untyped_storage()._cdata
        self._pinned.add(place)
        weakref.finalize(tensor.untyped_storage(), self._unpin, place, size)

    def _unpin(self, place: int, size: int) -> None:
        self._pinned.discard(place)
        self.pinned -= size
        self.unpinned += size

    def empty_host_cache(self) -> None:
        self.unpinned = 0

    # --- memory ---

    def _count(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if tensor.device.type != "cuda" or place in self._storages:
            return
        if tensor.dtype in self.refused:
            raise TypeError(
                f"Trying to convert {tensor.dtype} to the MPS backend but it does not have support for that dtype."
            )
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self.allocations += 1
        if self.live + size > self.total or self.allocations == self.fails_at:
            kind, message = MESSAGES[self.form]
            raise kind(message.format(size=size))
        self._storages.add(place)
        if self.current is not self.compute:
            self._used[place] = self.current, self.current, 0
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._storages.discard(place)
        _, stream, used = self._used.pop(place, (self.compute, self.compute, 0))
        self.early += stream.done < used and place not in self._recorded
        if stream := self._recorded.pop(place, None):
            self._held.append(Held(size, stream, stream.asked))
        else:
            self.live -= size

    def _settle(self) -> None:
        """Takes back what streams are done with."""
        while self._held and self._held[0].stream.done >= self._held[0].place:
            self.live -= self._held.popleft().size

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self._recorded[tensor.untyped_storage()._cdata] = stream

    def synchronize(self, *_: object) -> None:
        for stream in {id(s): s for s in (self.compute, self.current, *(held.stream for held in self._held))}.values():
            stream.synchronize()
        self._settle()

    @contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before


def _has_index(place: Any) -> bool:
    """True, where torch itself would not raise an error for a device without its number."""
    if isinstance(place, torch.device | str) and torch.device(place).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{place}")
    return True


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """What assigning to `.data` does, also where a tensor goes over to the device or comes from it."""
    if isinstance(tensor, FakeTensor) != isinstance(value, FakeTensor):
        value = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value.detach()
        for name in ("__class__", "__dict__"):
            before, after = getattr(tensor, name), getattr(value, name)
            setattr(tensor, name, after)
            setattr(value, name, before)
        torch._C._swap_tensor_impl(tensor, value)
        return
    Tensor_data.__set__(tensor, value)
    if isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device  # pyright: ignore  # an attribute, which stays as it was


def _apply(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module's own, which would swap fake tensors, with new parameters in their place."""
    for part in module.modules() if recurse else (module,):
        for name, value in part._parameters.items():
            if value is not None and (changed := change(value.data)) is not value.data:
                part._parameters[name] = nn.Parameter(changed, value.requires_grad)
        part._buffers.update({name: change(value) for name, value in part._buffers.items() if value is not None})
    return module


@contextmanager
def fake_cuda(
    size: float = 80, capability: tuple[int, int] = (9, 0), name: str = "Fake card", built_for: Sequence[str] = ()
) -> Iterator[Card]:
    """A context in which torch, with kernels for some architectures, finds a card of `size` GiB, that compute capability and
    name. Nothing else has changed, but that Python collects no garbage unless it is told to: when it does by itself is chance.
    """
    assert _LIBRARY, "torch was imported before: fake_cuda needs a process of its own, which imports it first"
    import peft  # noqa: F401  # imports bitsandbytes, which calls CUDA's library where it finds a card

    card = Card(size, capability)
    _LIBRARY.set_capability(capability[0])
    properties = SimpleNamespace(
        name=name, total_memory=card.total, major=capability[0], minor=capability[1], multi_processor_count=100
    )
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda *_: nullcontext(),
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda place: (card.total - card.live, card.total) if _has_index(place) else None,
        "memory_reserved": lambda *_: card.live,
        "memory_allocated": lambda *_: card.live,
        "max_memory_allocated": lambda *_: card.peak,
        "max_memory_reserved": lambda *_: card.peak,
        "reset_peak_memory_stats": lambda *_: setattr(card, "peak", card.live),
        "memory_stats": lambda *_: {},
        "host_memory_stats": lambda: {"allocated_bytes.current": card.pinned + card.unpinned},
        "get_arch_list": lambda: list(built_for),
        "empty_cache": lambda: None,
        "set_per_process_memory_fraction": lambda share, _: setattr(card, "share", share),
        "synchronize": card.synchronize,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: card.current,
        "stream": card.stream,
    }

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        card._pin(copy)
        return copy

    changes = [patch.object(torch.cuda, *item) for item in cuda.items()]
    changes.append(patch.object(torch._C, "_host_emptyCache", card.empty_host_cache, create=True))
    changes += [
        patch.object(Tensor, "pin_memory", pin_memory),
        patch.object(Tensor, "is_pinned", lambda tensor: tensor.untyped_storage()._cdata in card._pinned),
        patch.object(Tensor, "record_stream", lambda tensor, stream: card.record_stream(tensor, stream)),
        patch.object(Tensor, "data", property(Tensor_data.__get__, _set_data)),  # pyright: ignore
        patch.object(FakeTensor, "data", property(Tensor_data.__get__, _set_data), create=True),  # pyright: ignore
        patch.object(nn.Module, "_apply", _apply),
        patch.object(FakeTensorMode, "may_turn_const", lambda *_: False),
        patch.object(foreach_utils, "_foreach_supported_types", [*foreach_utils._foreach_supported_types, FakeTensor]),
    ]
    gc.collect()
    gc.disable()
    with ExitStack() as stack:
        stack.callback(gc.enable)
        for change in changes:
            stack.enter_context(change)
        # Else torch.tensor(..., device="cuda") copies where no mode sees it.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        yield stack.enter_context(card)
