"""Open a model on a named provider with a given number of threads, or fail: no silent fallback.

    session = Session("model.onnx", provider="cpu", threads=1)
    probabilities, embedding = session.run(image)

PROVIDERS holds the options of every provider. ONNX Runtime's telemetry is switched off before it is
imported.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ftkit_export.runtime.errors import BundleError, FtkitError, ProviderError, choices
from ftkit_export.runtime.onnxfile import inspect, shape_nodes

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # ONNX Runtime >= 1.29 reads it once, at import


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One configuration of an ONNX Runtime execution provider.

    name: as registered. options: that it is opened with. precision: "" = float32, else the type
    that it rounds to ("tf32", "fp16"). form: which of a variant's two files it runs, "image" or
    "core"; for the core form, Pillow and numpy do the preprocessing. gpu: inputs and outputs may
    stay on a GPU. captured: runs as a CUDA graph, with IO binding only. whole: every operator of a
    model must run on it; other providers leave unsupported operators to another one by design.
    """

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    precision: str = ""
    form: str = "image"
    gpu: bool = False
    captured: bool = False
    whole: bool = False


_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"


def _cuda(precision: str = "", search: str = "HEURISTIC", captured: bool = False) -> Provider:
    """The CUDA provider in one configuration.

    HEURISTIC: ONNX Runtime's default, EXHAUSTIVE, costs seconds on the first run of each input
    shape. Core form: CUDA's Resize does not support antialiasing of 8-bit NHWC images
    (onnxruntime/core/providers/cuda/tensor/upsample.cc).
    """
    options = {
        "cudnn_conv_algo_search": search,
        "use_tf32": str(int(precision == "tf32")),
        "enable_cuda_graph": str(int(captured)),
    }

    return Provider(
        name=_CUDA,
        options=options,
        precision=precision,
        form="core",
        gpu=True,
        captured=captured,
        whole=True,
    )


PROVIDERS: Mapping[str, Provider] = {
    "cpu": Provider(name=_CPU),
    "cuda": _cuda(),
    "cuda-tf32": _cuda("tf32"),
    "cuda-default": _cuda(search="DEFAULT"),
    "cuda-exhaustive": _cuda(search="EXHAUSTIVE"),
    "cuda-graph": _cuda(captured=True),
    # TensorRT uses TF32 and has no option to disable it; NVIDIA_TF32_OVERRIDE=0 does, for a whole
    # process.
    "tensorrt": Provider(name=_TENSORRT, precision="tf32", form="core", gpu=True),
    "tensorrt-fp16": Provider(
        name=_TENSORRT, options={"trt_fp16_enable": "True"}, precision="fp16", form="core", gpu=True
    ),
    "openvino": Provider(name="OpenVINOExecutionProvider"),
    "coreml": Provider(name="CoreMLExecutionProvider"),
    "xnnpack": Provider(name="XnnpackExecutionProvider"),
    "qnn": Provider(name="QNNExecutionProvider"),
    "directml": Provider(name="DmlExecutionProvider"),
}


OPTIMISED = "optimised.onnx"  # in a folder with a profile

# CPU quota; in a container, its own (Linux, Documentation/admin-guide/cgroup-v2.rst)
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def _runtime() -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    return onnxruntime


def processors() -> list[int]:
    """Numbers of the processors this process may use; empty if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def cores() -> int:
    """Number of cores this process may use.

    Less than the machine has under CPU affinity (taskset, a container's cpuset) or a CPU quota
    (`docker run --cpus`, a Kubernetes limit; cgroup v2), which is rounded down.
    """
    seen = len(processors()) or os.cpu_count() or 1
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or no quota: "max 100000"
        return seen
    return min(seen, max(1, quota // period))


def offered() -> list[str]:
    """Short names of the providers in the installed ONNX Runtime; they may still fail here."""
    available = _runtime().get_available_providers()
    return [short for short, provider in PROVIDERS.items() if provider.name in available]


def parse_providers(text: str) -> list[str]:
    """ "cpu,cuda" -> ["cpu", "cuda"]. Raises ProviderError with the choices for an unknown name."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PROVIDERS:
            raise ProviderError(
                f"--providers: expected known providers, {choices(name, PROVIDERS)}"
            )

    if not names:
        raise ProviderError("--providers: expected at least one provider, found none. Try cpu")
    return list(dict.fromkeys(names))


def form_of(provider: str, image: Any, core: Any) -> Any:
    """Return the one of a model's two forms that this provider runs."""
    return image if PROVIDERS[provider].form == "image" else core


def engine_cache(model: bytes) -> dict[str, str]:
    """TensorRT options to cache engines, which take minutes to build, with ftkit's other caches.

    One folder per model: ONNX Runtime looks engines up by the graph's names and shapes, and would
    use one built for other weights (microsoft/onnxruntime, issue 6455).
    """
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(os.environ.get("FTKIT_CACHE") or Path(home) / "ftkit") / "tensorrt"

    folder = place / f"{hashlib.sha256(model).hexdigest()[:32]}-{_runtime().__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: without a cache
        return {}

    return {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(folder)}


def require_provider(provider: str) -> None:
    """Raises ProviderError if `provider` is unknown, or not in the installed ONNX Runtime."""
    if provider not in PROVIDERS:
        raise ProviderError(f"provider: expected a known provider, {choices(provider, PROVIDERS)}")
    if provider not in offered():
        raise ProviderError(
            f"provider {provider}: expected an ONNX Runtime built with it, found one with "
            f"{', '.join(offered())}. Try --providers cpu, or `ftkit doctor`"
        )


def missing_library(provider: str) -> str:
    """Why the provider's shared library does not load here (loader's message); empty if it does."""
    import ctypes

    if not PROVIDERS[provider].gpu:
        return ""

    stem = "cuda" if PROVIDERS[provider].name == _CUDA else "tensorrt"
    folder = Path(_runtime().__file__).parent / "capi"
    library = next(iter(sorted(folder.glob(f"*onnxruntime_providers_{stem}.*"))), None)
    if library is None:
        return f"this ONNX Runtime ships no {stem} library"

    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)

    return ""


@dataclass(frozen=True, kw_only=True)
class Input:
    """An input or output as declared in the file.

    type: ONNX Runtime's name, "tensor(float)". shape: an int, or a name (or None) where the size is
    free.
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]


def in_words(provider: str, operators: int, away: Mapping[str, int]) -> str:
    """Operator placement as text: how many run on the provider, and how many elsewhere.

    Shape arithmetic is not counted as elsewhere.
    """
    others = ", ".join(f"{count} on {name}" for name, count in sorted(away.items()))
    here = operators - sum(away.values())
    return (
        f"{here} of {operators} operators on {provider}, {others}"
        if others
        else f"every operator on {provider}"
    )


class Session:
    """An ONNX Runtime session, verified to run on the requested provider.

    model: a path or the serialized bytes. provider: a key of PROVIDERS. threads: intra-op threads,
    0 = all cores. spinning: whether idle worker threads spin (lower latency, a busy core).
    optimised: whether ONNX Runtime may optimise the graph. shared: other sessions run between this
    one's runs, so its threads spin only during a run, each pinned to its own processor (otherwise
    two sessions of one model, with two threads on two cores, differ by 19 %, or by half when both
    threads wake on one core). profile: a folder to which ONNX Runtime's profiler and the optimised
    graph are written. placement: where its operators run, as text. Raises ProviderError when the
    provider is unknown, absent, not the one in use, or (CUDA) does not run every operator, BundleError
    when the file refers to anything outside it, FtkitError when it does not load.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        *,
        provider: str = "cpu",
        threads: int = 0,
        spinning: bool = True,
        optimised: bool = True,
        shared: bool = False,
        profile: Path | None = None,
    ):
        require_provider(provider)
        self.provider = provider
        self.threads = threads or cores()
        self._session = self._open(model, spinning, optimised, shared, profile)
        self._prove()
        self.placement = self._placed(model)
        self.inputs = [
            Input(name=item.name, type=item.type, shape=tuple(item.shape))
            for item in self._session.get_inputs()
        ]
        self.outputs = [
            Input(name=item.name, type=item.type, shape=tuple(item.shape))
            for item in self._session.get_outputs()
        ]
        self.input_names = [item.name for item in self.inputs]
        self.output_names = [item.name for item in self.outputs]
        self.metadata = self._read_metadata(model)

    def _open(
        self,
        model: str | Path | bytes,
        spinning: bool,
        optimised: bool,
        shared: bool,
        profile: Path | None,
    ) -> Any:
        ort = _runtime()
        chosen = PROVIDERS[self.provider]
        if chosen.gpu and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from torch's wheels; without them, the CPU

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4

        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

        if profile:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / "run")
            options.optimized_model_filepath = str(profile / OPTIMISED)

        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if spinning else "0"
        )
        options.add_session_config_entry("session.force_spinning_stop", "1" if shared else "0")

        others = processors()[1 : self.threads]  # the first is for the calling thread
        if shared and others and len(others) == self.threads - 1:
            words = ";".join(str(number + 1) for number in others)  # ONNX Runtime counts from 1
            options.add_session_config_entry("session.intra_op_thread_affinities", words)

        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        where = "model" if isinstance(model, bytes) else str(model)

        if not isinstance(model, bytes) and not Path(model).is_file():
            raise FtkitError(f"{where}: expected an ONNX file, found none. Check the path")
        if not isinstance(model, bytes):
            inspect(model)  # files may be untrusted

        source = model if isinstance(model, bytes) else str(model)
        providers = [(chosen.name, dict(chosen.options))]

        if chosen.name == _TENSORRT:  # unsupported operators run on CUDA, not on the CPU
            providers[0][1].update(
                engine_cache(model if isinstance(model, bytes) else Path(model).read_bytes())
            )
            providers.append((_CUDA, dict(PROVIDERS["cuda-tf32"].options)))

        try:
            # enable_fallback=0: otherwise ONNX Runtime prints to standard output and retries on
            # the CPU
            return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            reason = str(error).split("\n")[0]
            if missing := missing_library(self.provider):
                raise ProviderError(self._not_proven(f"none: {missing}")) from None
            raise FtkitError(
                f"{where}: expected a model ONNX Runtime can load, found: {reason}. Try `ftkit doctor`"
            ) from None

    def _prove(self) -> None:
        active = self._session.get_providers()[0]
        if active != PROVIDERS[self.provider].name:
            why = missing_library(self.provider) or "its device did not answer"
            raise ProviderError(self._not_proven(f"{active}: {why}"))

    def _read_metadata(self, model: str | Path | bytes) -> dict[str, str]:
        try:
            return dict(self._session.get_modelmeta().custom_metadata_map)
        except UnicodeDecodeError as error:
            where = "model" if isinstance(model, bytes) else str(model)
            raise BundleError(
                f"{where}: expected metadata in UTF-8, found other bytes ({error.reason}). Copy the file again"
            ) from None

    def _not_proven(self, found: str) -> str:
        wanted = PROVIDERS[self.provider].name
        return (
            f"provider {self.provider}: expected a session on {wanted}, found {found}. "
            "Try `ftkit doctor`, or --providers cpu"
        )

    def _placed(self, model: str | Path | bytes) -> str:
        """Operator placement, as text.

        Raises ProviderError where all operators must run on the provider and some do not.
        """
        chosen = PROVIDERS[self.provider]
        if chosen.name == _CPU:
            return in_words(chosen.name, 0, {})  # there is no other provider

        parts = self._assigned()
        if not parts:
            return "unknown: this ONNX Runtime does not report where its operators run"

        away = [item for item in parts if item[0] != chosen.name]
        if away:
            shapes = shape_nodes(model)
            away = [item for item in away if item[1] not in shapes]

        if away and chosen.whole:
            named = ", ".join(sorted({f"{kind} on {where}" for where, _, kind in away}))
            raise ProviderError(
                self._not_proven(f"{len(away)} of {len(parts)} operators elsewhere: {named}")
            )

        return in_words(chosen.name, len(parts), Counter(where for where, _, _ in away))

    def _assigned(self) -> list[tuple[str, str, str]]:
        """(provider, node name, operator) of each node, as assigned by ONNX Runtime.

        Empty where it cannot tell.
        """
        if not hasattr(self._session, "get_provider_graph_assignment_info"):
            return []
        return [
            (part.ep_name, node.name, node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]

    def end_profile(self) -> Path:
        """The file with the events of all runs so far; the profiler stops."""
        return Path(self._session.end_profiling())

    def run(self, *arrays: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        """Run on inputs, in the model's order; returns the outputs, in the model's order.

        Raises ProviderError when the provider needs IO binding, FtkitError when the model cannot
        run.
        """
        if PROVIDERS[self.provider].captured:
            raise ProviderError(
                f"provider {self.provider}: expected to be run with IO binding, which `ftkit bench` "
                "does, found plain runs. Try cuda"
            )

        feed = dict(zip(self.input_names, arrays, strict=True))
        try:
            outputs: list[np.ndarray[Any, Any]] = self._session.run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            shapes = ", ".join(
                f"{name} {array.dtype} {array.shape}" for name, array in feed.items()
            )
            reason = str(error).split("\n")[0]
            raise FtkitError(
                f"model: expected to run on {shapes}, found: {reason}. Check the input's shape"
            ) from None

        return outputs

    def bound(self, *arrays: np.ndarray[Any, Any]) -> Callable[[], list[Any]]:
        """Return a call that runs with IO binding: inputs and outputs (OrtValues) stay on device.

        Outputs of known size keep their address, as a captured CUDA graph requires.
        """
        device = "cuda" if PROVIDERS[self.provider].gpu else "cpu"
        binding = self._session.io_binding()
        value_of = _runtime().OrtValue
        values = [value_of.ortvalue_from_numpy(array, device, 0) for array in arrays]
        for name, value in zip(self.input_names, values, strict=True):
            binding.bind_ortvalue_input(name, value)

        for item in self._session.get_outputs():
            sizes = list(item.shape)
            if sizes and self.inputs and self.inputs[0].shape[:1] == tuple(sizes[:1]):
                sizes[0] = arrays[0].shape[0]  # the batch: both have its name

            if (
                item.type == "tensor(float)"
                and sizes
                and all(isinstance(size, int) for size in sizes)
            ):
                values.append(value_of.ortvalue_from_shape_and_type(sizes, np.float32, device, 0))
                binding.bind_ortvalue_output(item.name, values[-1])
            else:
                binding.bind_output(item.name, device)

        def run(_: object = values) -> list[Any]:  # keeps the values alive
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as error:  # ONNX Runtime's exceptions share no base class
                raise FtkitError(
                    f"model: expected to run with IO binding, found: {str(error).splitlines()[0]}. "
                    "Try `ftkit doctor`"
                ) from None

            outputs: list[Any] = binding.get_outputs()
            return outputs

        return run
