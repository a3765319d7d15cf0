"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

arXiv 2205.05638, NeurIPS 2022.

Vectors that train scale the keys and values of attentions and the inner activations of
feed-forwards, all else is frozen. They start at one, so that nothing changes at first; folded into
the layers they cost nothing.

Implemented through the package peft (pip install 'pared[adapters]'), whose layers are put in at the
sites that pared's anatomy names. The default is the paper's: keys, values and feed-forwards
(`places=["fc2"]` for feed-forwards alone), and so is healing's learning rate, 3e-3. Both streams of
a joint attention and cross-attentions count as attentions; FLUX's one-stream blocks have no
feed-forward of their own to scale.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field

from pared.anatomy import Family
from pared.info import Info
from pared.tuning.peft_adapter import PeftAdapter, exactly

INFO = Info(
    slug="ia3",
    title="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    arxiv="2205.05638",
    venue="NeurIPS 2022",
    kind="conversion",
    families=("dit", "pixart", "sd3", "unet", "flux"),
    training=True,
    exact=False,
    maturity="faithful",
    summary="vectors scale keys, values and inner activations; they fold away afterwards",
    cls="IA3",
)


class IA3(PeftAdapter):
    """l_k K, l_v V and W_2 (l_ff gamma(W_1 x)), section 3.3 of the paper."""

    info = INFO
    learning_rate: ClassVar[float] = 3e-3
    added: ClassVar[tuple[str, ...]] = ("ia3_l.",)

    places: tuple[Literal["k", "v", "fc2"], ...] = Field(
        default=("k", "v", "fc2"),
        min_length=1,
        description="what is scaled: k and v of attentions, the input of fc2 of feed-forwards",
    )

    def config(self, family: Family) -> Any:
        from peft import IA3Config

        # Of a feed-forward's layer peft scales the input.
        inner = self.paths(family, "fc2") if "fc2" in self.places else []
        return IA3Config(
            target_modules=exactly(self.layers(family)), feedforward_modules=exactly(inner)
        )
