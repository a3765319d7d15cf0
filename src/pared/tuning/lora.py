"""LoRA: Low-Rank Adaptation of Large Language Models.

arXiv 2106.09685, ICLR 2022.

Beside the frozen weights W of a linear layer a product of two thin matrices trains:
y = W x + (alpha / r) B A x. B starts at zero, so that nothing changes at first; folded into W they
cost nothing.

Implemented through the package peft (pip install 'pared[adapters]'), whose layers are put in at the
sites that pared's anatomy names; so it works on models to which diffusers adds no adapters (DiT,
PixArt) too. The default is the paper's: queries and values of the attentions, scale 1. Both streams
of a joint attention and cross-attentions count as attentions. A starts as peft starts it, uniform
after Kaiming (the paper: Gaussian). Not here: dropout, biases, rsLoRA and DoRA.
"""

import json
from typing import Any, ClassVar

from pydantic import Field

from pared.anatomy import Family
from pared.anatomy.base import Role
from pared.info import Info
from pared.tuning.peft_adapter import PeftAdapter, exactly

INFO = Info(
    slug="lora",
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    arxiv="2106.09685",
    venue="ICLR 2022",
    kind="conversion",
    families=("dit", "pixart", "sd3", "unet", "flux"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="a product of two thin matrices trains beside frozen weights; folds away afterwards",
    cls="LoRA",
)


class LoRA(PeftAdapter):
    """y = W x + (alpha / r) B A x, equation 3 of the paper.

    Merge it before you load LoRAs of a style or the like: `LoRA().merge(pipeline)`.
    """

    info = INFO
    added: ClassVar[tuple[str, ...]] = ("lora_A.", "lora_B.")

    r: int = Field(default=8, ge=1, description="rank")
    alpha: float | None = Field(default=None, gt=0, description="by default r, for a scale of 1")
    places: tuple[Role, ...] = Field(
        default=("q", "v"),
        min_length=1,
        description="layers: q, k, v and out of attentions, fc1 and fc2 of feed-forwards",
    )

    def config(self, family: Family) -> Any:
        from peft import LoraConfig

        return LoraConfig(**self._settings(family))

    def metadata(self, family: Family) -> dict[str, str]:
        """What diffusers' `load_lora_adapter` takes the settings from."""
        return {"lora_adapter_metadata": json.dumps(self._settings(family))}

    def _settings(self, family: Family) -> dict[str, Any]:
        return {
            "r": self.r,
            "lora_alpha": self.r if self.alpha is None else self.alpha,
            "target_modules": exactly(self.layers(family)),
        }
