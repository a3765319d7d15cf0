"""What must hold of DiffFit without trained weights: its paper's arithmetic.

Run by `pared check difffit`.
"""

import torch
from torch import Tensor, nn

from pared import anatomy
from pared.anatomy import presets
from pared.method import convert
from pared.tuning.difffit import DiffFit, ScaledLinear, fold


def published_dit(classes: int) -> nn.Module:
    """DiT-XL/2 without weights, laid out as the published code: the blocks share the embeddings of
    timestep and label.
    """
    with torch.device("meta"):
        model = presets.get("dit-xl-2").denoiser.make(num_embeds_ada_norm=classes)
    first, *others = (block.module.norm1 for block in anatomy.of(model).blocks)
    for norm in others:
        norm.emb = first.emb
    return model


def _count(model: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def _random_layer(**type_: torch.dtype) -> ScaledLinear:
    """A scaled layer, 5 to 3, with two vectors, none of them ones."""
    torch.manual_seed(0)
    layer = ScaledLinear(nn.Linear(5, 3, **type_), ["gamma", "gamma_branch"])
    for gamma in layer.gammas:
        nn.init.normal_(gamma, mean=1, std=0.3)
    return layer


def check_counts() -> None:
    """What trains of DiT-XL/2 for 101 classes: 607,136 without gamma; 671,648; 768,416; 832,928."""
    # The published code counts its table of positions, 256 x 1152; diffusers keeps it as a buffer.
    total = _count(published_dit(1000)) + 256 * 1152
    assert total == 675_129_632, f"{total} parameters in all"
    wanted = {(): 607_136, "blocks": 671_648, "blocks+qkv": 768_416, "full": 832_928}
    for locations, count in wanted.items():
        model = convert(published_dit(101), DiffFit(locations=locations))
        found = _count(model, trained_only=True)
        assert found == count, f"{locations or 'no locations'}: {found} train, not {count}"


def check_identity() -> None:
    """With gammas of one every layer and the whole model stay what they were."""
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    assert torch.equal(ScaledLinear(layer, ["gamma"])(x), layer(x)), "a layer of ones changes x"
    before, after = (presets.build("toy:sd3", device="cpu") for _ in range(2))
    convert(after, DiffFit())
    # Other kernels may be chosen where other tensors want gradients.
    torch.testing.assert_close(_output(after), _output(before), rtol=0, atol=1e-6)


def check_merge() -> None:
    """diag(gamma) W and gamma b compute the same as the scaled layer, within 1e-12."""
    layer = _random_layer(dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(fold(layer)(x), layer(x), rtol=0, atol=1e-12)


def check_gradient() -> None:
    """dL/dgamma_c is the sum over tokens of dL/dy_c y_c / gamma_c."""
    layer = _random_layer(dtype=torch.float64)
    y = layer(torch.randn(2, 7, 5, dtype=torch.float64))
    y.retain_grad()
    y.square().mul(torch.randn(2, 7, 3, dtype=torch.float64)).sum().backward()
    for gamma in layer.gammas:
        wanted = (y.grad * y / gamma).sum(dim=(0, 1))
        torch.testing.assert_close(gamma.grad, wanted, rtol=1e-10, atol=1e-12)


def check_new_classes_keep_the_null_row() -> None:
    """A label table for other classes is new but for its last row."""
    before, model = (presets.build("toy:dit", device="cpu") for _ in range(2))
    convert(model, DiffFit(classes=3))
    for path in anatomy.of(model).label_tables:
        old, new = before.get_submodule(path).weight, model.get_submodule(path).weight
        assert new.shape == (4, old.shape[1]), f"the table is {tuple(new.shape)}"
        assert torch.equal(new[-1], old[-1]), "the row of the null class was changed"
        assert not torch.equal(new[:3], old[:3]), "the other rows are the old ones"


@torch.no_grad()
def _output(model: nn.Module) -> Tensor:
    family = anatomy.of(model)
    example = family.example(text_tokens=8, generator=torch.Generator().manual_seed(0))
    return family.denoise(model, *example)
