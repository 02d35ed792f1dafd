from pathlib import Path

import pytest
import torch

from core.lora.changes import weight_change
from core.lora.kinds import kind_of, needs_base, weight_shape
from core.storage.safetensors_file import SafetensorsFile
from core.tensor_names import parse_key

# Adapters with random values, and the weight change that lycoris-lora 4.1.3 computes from them.
LYCORIS = SafetensorsFile.open(Path(__file__).parents[1] / "reference" / "lycoris.safetensors")
CASES = sorted({name.split("/")[0] for name in LYCORIS if "/" in name})


def case(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    tensors = {}
    for key in LYCORIS:
        if key.startswith(f"{name}/") and not key.endswith("/expected"):
            named = parse_key(f"lora_unet_x.{key.split('/')[1]}")
            assert named is not None
            tensors[named.role] = LYCORIS[key]
    return tensors, LYCORIS[name.split(", ")[1]], LYCORIS[f"{name}/expected"]


@pytest.mark.parametrize("name", CASES)
def test_the_weight_change_is_that_of_lycoris(name):
    tensors, base, expected = case(name)
    kind = kind_of({role: tuple(tensor.shape) for role, tensor in tensors.items()})
    assert kind is not None
    change = weight_change(kind, tensors, base)
    assert torch.allclose(change.reshape(base.shape), expected, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("oft", "boft"))])
def test_the_shape_of_the_weight_is_known_from_the_shapes_in_the_file(name):
    tensors, base, _ = case(name)
    shapes = {role: tuple(tensor.shape) for role, tensor in tensors.items()}
    shape = weight_shape(str(kind_of(shapes)), shapes)
    assert shape is not None
    assert shape[0] == base.shape[0] and torch.Size(shape).numel() == base.numel()


def test_a_change_that_depends_on_the_base_needs_it():
    tensors, _, _ = case("oft, linear")
    assert needs_base("oft", tensors)
    with pytest.raises(ValueError, match="depends on the base weight"):
        weight_change("oft", tensors)


@pytest.mark.parametrize("roles", [{"down"}, {"up", "alpha"}, {"lokr_w1"}, {"hada_w1_a", "hada_w1_b"}, {"alpha"}])
def test_an_incomplete_module_is_of_no_kind(roles):
    assert kind_of(dict.fromkeys(roles, (2, 2))) is None
