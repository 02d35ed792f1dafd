"""core/models/attention.py, and what transformer.py changes in diffusers' networks: they compute what diffusers' own do."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

from core.models.attention import rotated, tables_of_halves, tables_of_pairs
from core.models.families import FAMILIES
from core.models.spec import stack_conditioning
from core.models.transformer import RmsNorm
from tests.models.references import REFERENCES
from tests.tooling import mostly_slow, small_flow_base

CPU = torch.device("cpu")
CLASSES = {
    "sd3": "SD3Transformer2DModel",
    "flux1": "FluxTransformer2DModel",
    "chroma": "ChromaTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "flux3": "Flux3Transformer2DModel",
    "zimage": "ZImageTransformer2DModel",
    "qwen-image": "QwenImageTransformer2DModel",
    "krea2": "Krea2Transformer2DModel",
    "ernie-image": "ErnieImageTransformer2DModel",
    "longcat-image": "LongCatImageTransformer2DModel",
}
"""The class of some families' denoiser in diffusers. test_references.py compares others."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


base_of = cache(small_flow_base)


def results(network: nn.Module, name: str, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A prediction of the network for random latents, and the gradients of its parameters."""
    base = base_of(name)
    encode = base.caption_encoder.encode  # pyright: ignore
    conditioning = stack_conditioning([encode("a photo" + n * " of a person") for n in range(batch)])
    sizes = [base.family.image_conditioning((64, 64), (0, 0), (64, 64))] * batch
    latents = torch.randn(batch, base.latent_shape.channels, 8, 12, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(300, 700, batch)
    network.requires_grad_(True)
    prediction = base.family.predict(network, latents, times, conditioning | stack_conditioning(sizes))
    prediction.square().sum().backward()
    gradients = {path: p.grad for path, p in network.named_parameters() if p.grad is not None}
    return prediction.detach(), gradients


@pytest.mark.parametrize("name", CLASSES)
def test_one_picture_needs_no_mask(name, monkeypatch):
    """With a mask a GPU has slower kernels for attention."""
    masks, plain = [], F.scaled_dot_product_attention

    def seen(*parts: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return plain(*parts, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    results(base_of(name).load("denoiser", CPU, torch.float32), name, 1)
    assert masks and all(mask is None for mask in masks)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", mostly_slow(tuple(CLASSES), "flux1", "zimage"))
def test_a_denoiser_predicts_and_learns_as_that_of_diffusers(name, batch):
    ours = base_of(name).load("denoiser", CPU, torch.float32)
    theirs = getattr(diffusers, CLASSES[name]).from_config(dict(ours.config))  # pyright: ignore
    loaded = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(re.search(base_of(name).family.unused, key) for key in loaded.missing_keys)
    (prediction, gradients), (expected, wanted) = (results(network, name, batch) for network in (ours, theirs))
    assert difference(prediction, expected) < 1e-6
    assert gradients.keys() == wanted.keys() and len(wanted) > 20
    for path, gradient in wanted.items():
        assert (gradients[path] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6 * expected.norm(), path


def pairs_of_flux(x: Tensor, angles: Tensor) -> Tensor:
    return apply_rotary_emb(x, tuple(part.repeat_interleave(2, -1) for part in (angles.cos(), angles.sin())), sequence_dim=1)  # pyright: ignore # fmt: skip


def complex_pairs(x: Tensor, angles: Tensor) -> Tensor:
    return apply_rotary_emb_qwen(x, torch.polar(torch.ones_like(angles), angles), use_real=False)  # pyright: ignore


@pytest.mark.parametrize("theirs", [pairs_of_flux, complex_pairs])
def test_a_rotation_is_that_of_diffusers_and_no_rougher_in_bf16(theirs: Callable[[Tensor, Tensor], Tensor]):
    generator = torch.Generator().manual_seed(1)
    exact, output = (torch.randn(2, 5, 3, 16, generator=generator) for _ in range(2))
    angles = 50 * torch.rand(5, 8, generator=generator)
    tables = tables_of_pairs(angles.cos(), angles.sin())

    def both(rotate: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = exact.to(dtype, copy=True).requires_grad_()
        y = rotate(x)
        assert y.dtype == dtype
        y.backward(output.to(dtype))
        assert x.grad is not None
        return y.detach(), x.grad

    wanted = both(lambda x: theirs(x, angles), torch.float32)
    for value, expected in zip(both(lambda x: rotated(x, tables), torch.float32), wanted, strict=True):
        assert difference(value, expected) < 1e-6
    ours, rough = (both(way, torch.bfloat16) for way in (lambda x: rotated(x, tables), lambda x: theirs(x, angles)))
    for value, other, expected in zip(ours, rough, wanted, strict=True):
        assert difference(value, expected) <= 1.01 * difference(other, expected)


def test_a_rotation_between_halves_has_the_gradient_of_its_formula():
    """ERNIE-Image's angles are not those of a rotation: two partners have different ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 3, 8, generator=generator, dtype=torch.double, requires_grad=True)
    angles = torch.rand(2, 5, 8, generator=generator, dtype=torch.double)
    first, second = x.chunk(2, -1)
    formula = x * angles.cos()[:, :, None] + torch.cat([-second, first], -1) * angles.sin()[:, :, None]
    value = rotated(x, tables_of_halves(angles), halves=True)
    torch.testing.assert_close(value, formula)
    (wanted,) = torch.autograd.grad(formula.square().sum(), x)
    (found,) = torch.autograd.grad(value.square().sum(), x)
    torch.testing.assert_close(found, wanted)


def test_a_rotation_keeps_nothing_but_its_tables():
    kept: list[Any] = []
    x = torch.randn(1, 4, 2, 8, requires_grad=True)
    tables = tables_of_pairs(torch.rand(4, 4), torch.rand(4, 4))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.untyped_storage()._cdata), lambda _: _
    ):
        rotated(x, tables)
    assert set(kept) == {table.untyped_storage()._cdata for table in tables}


def test_a_norm_under_autocast_hands_on_the_dtype_of_its_weight():
    norm = RmsNorm(8, 1e-6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(2, 8)).dtype == torch.bfloat16


def test_every_family_of_transformers_is_compared_with_diffusers_or_its_authors():
    assert {name for name, family in FAMILIES.items() if family.flow_shift} <= {*CLASSES, *REFERENCES, "moss-image"}
