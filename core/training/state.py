"""The state of a training run in one safetensors file: everything needed to continue as if it had never stopped.

The order of the photos, the noise and the timesteps depend only on the seed and the step. For them, only the step is saved.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadConfig, BadFile
from ..storage.plain_values import parse_json
from ..storage.safetensors_file import (
    Digest,
    Layout,
    SafetensorsFile,
    layout_of,
    storage_order,
    tensor_bytes,
    write_safetensors,
)
from .step import Run

STATE_VERSION = "2"
"""A part of every state. Raise it when the same inputs would train differently, as job.TRAINING_VERSION."""
_BEGIN_ANEW = "delete it, or start over with restart"


@dataclass(frozen=True, eq=False)
class RunState:
    """The state of a training run between two steps."""

    step: int
    """The number of completed steps."""
    identity: Mapping[str, str]
    """The settings, photos and base model of the run, from `identity.run_identity`."""
    tensors: Mapping[str, Tensor]
    """The tensors of the adapter, its running average, the optimizer and the measurements, by name."""
    scalars: Mapping[str, Any]
    """The other values of the optimizer, the loss scaler and the measurements, in a form that JSON can hold."""

    def save(self, path: Path) -> None:
        header = {
            "step": str(self.step),
            "version": STATE_VERSION,
            "identity": json.dumps(dict(self.identity)),
            "scalars": json.dumps(dict(self.scalars)),
        }
        layout = layout_of(self.tensors)
        write_safetensors(path, layout, self.tensors.__getitem__, header, {_DIGEST: _digest_of(header, layout)})


_DIGEST = "digest"
"""The metadata key for the SHA-256 of everything else. Without it, training would silently continue from flipped bits."""


def _digest_of(header: Mapping[str, str], layout: Layout) -> Digest:
    described = {name: (str(dtype), list(shape)) for name, (dtype, shape) in layout.items()}
    return hashlib.sha256(json.dumps([dict(header), described], sort_keys=True).encode())


def read_state(path: Path, identity: Mapping[str, str]) -> RunState:
    """Read the saved state. Raises BadConfig when it is from a run with another identity, BadFile when it is damaged."""
    try:
        file = SafetensorsFile.open(path)
    except BadFile as error:
        raise BadFile(str(error).replace("download it again", _BEGIN_ANEW)) from None
    try:
        step, saved = int(file.metadata["step"]), dict(parse_json(file.metadata["identity"]))
        scalars, version = dict(parse_json(file.metadata["scalars"])), file.metadata["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise BadFile(f"{path}: is not the state of a training run ({error})") from None
    if version != STATE_VERSION:
        raise BadConfig(f"{path}: was saved by another version of this program, so it can't be resumed; {_BEGIN_ANEW}")
    digest = _digest_of({key: text for key, text in file.metadata.items() if key != _DIGEST}, file.layout)
    for name in storage_order(file.layout):
        digest.update(tensor_bytes(file[name]))
    if file.metadata.get(_DIGEST) != digest.hexdigest():
        raise BadFile(f"{path}: the file is damaged, since its checksum doesn't match; {_BEGIN_ANEW}")
    changed = [name for name in identity if saved.get(name) != identity[name]]
    if changed:
        raise BadConfig(
            f"{path}: belongs to a run with other {' and '.join(changed)}"
            f"{_difference(saved, identity)}; use the same, {_BEGIN_ANEW}"
        )
    # Copied into memory, since the file is replaced while the run continues.
    return RunState(step, saved, {name: file[name].clone() for name in file}, scalars)


def _difference(saved: Mapping[str, str], identity: Mapping[str, str]) -> str:
    """List up to four settings that differ, for the error message. Returns "" when none do."""
    if saved.get("settings") == identity["settings"]:
        return ""
    try:
        old, new = json.loads(saved["settings"]), json.loads(identity["settings"])
    except (KeyError, ValueError):
        return ""
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return " (" + ", ".join(f"{name}: {old.get(name)} then, {new.get(name)} now" for name in names[:4]) + ")"


def pack_run(
    run: Run,
    identity: Mapping[str, str],
    more_tensors: Mapping[str, Tensor],
    likeness: Sequence[Mapping[str, Any]],
) -> RunState:
    """Return the current state of a run, with `more_tensors` and the measured likeness."""
    tensors = {f"adapter.{name}": value.detach().cpu() for name, value in run.parameters.items()}
    if run.average is not None:
        tensors |= {f"average.{name}": value.cpu() for name, value in run.average.items()}
    tensors["loss"] = run.loss.cpu()
    optimizer_tensors, scalars = pack_optimizer(run.optimizer)
    scalars |= {"scaler": run.scaler.state_dict(), "likeness": list(likeness), "narrowed_after": run.quantised_after}
    return RunState(run.step, identity, {**tensors, **optimizer_tensors, **more_tensors}, scalars)


@torch.no_grad()
def restore_run(run: Run, state: RunState) -> None:
    """Restore a run to a state that `pack_run` returned."""
    run.model.put({name: state.tensors[f"adapter.{name}"] for name in run.parameters})
    for name, value in (run.average or {}).items():
        value.copy_(state.tensors[f"average.{name}"])
    unpack_optimizer(run.optimizer, state.tensors, state.scalars)
    run.scaler.load_state_dict(state.scalars["scaler"])
    run.loss = state.tensors["loss"].to(run.loss.device)
    run.step = state.step
    run.quantised_after = state.scalars["narrowed_after"]
    model, plan = run.model, run.model.memory.plan
    if run.quantised_after is not None and plan.weights == "full":  # now there is more memory than before
        model.adopt(next(one for one in model.plans if one.weights == "8 bits" and one.saves_as_much_as(plan)))


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert the state of any optimizer to tensors by name, and plain values for JSON."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for index, entries in state["state"].items():
        for name, value in _flat(entries).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu()
            else:
                values[f"{index}.{name}"] = value
    groups = []
    for index, group in enumerate(state["param_groups"]):
        group = {name: value for name, value in group.items() if name != "params"}
        tensors |= {f"group.{index}.{k}": v.detach().cpu() for k, v in group.items() if isinstance(v, Tensor)}
        groups.append({name: value for name, value in group.items() if not isinstance(value, Tensor)})
    return tensors, {"values": values, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]
) -> None:
    """Restore an optimizer to the state that `pack_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            index, _, name = key.removeprefix("optimizer.").partition(".")
            _put(state.setdefault(int(index), {}), name, tensor)
    for key, value in scalars["values"].items():
        index, _, name = key.partition(".")
        _put(state.setdefault(int(index), {}), name, value)
    groups = optimizer.state_dict()["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, scalars["groups"], strict=True)):
        group.update({name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()})
        prefix = f"group.{index}."
        group.update({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested dictionaries, which bitsandbytes uses, by joining their keys with "/"."""
    flat = {}
    for name, value in entries.items():
        inner = _flat(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}/{key}": v for key, v in inner.items()}
    return flat


def _put(entries: dict[str, Any], name: str, value: Any) -> None:
    outer, slash, inner = name.partition("/")
    if slash:
        _put(entries.setdefault(outer, {}), inner, value)
    else:
        entries[name] = value
