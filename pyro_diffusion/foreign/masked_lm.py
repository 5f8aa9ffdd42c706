"""Masked language models as absorbing diffusions."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_diffusion.denoisers import CategoricalDenoiser
from pyro_diffusion.foreign.edm import check_module
from pyro_diffusion.nn.definition import DefinedModule
from pyro_diffusion.processes import Absorbing
from pyro_diffusion.schedules import Rectified, Schedule
from pyro_diffusion.validation import check_positive_int

__all__ = ["MaskedLogits", "from_masked_lm"]

# A logit of what is never data; minus infinity would make 0 times infinity of a term of probability zero.
NEVER = -1e4


def from_masked_lm(
    network: nn.Module,
    vocabulary: int,
    mask_token: int,
    never: Sequence[int] = (),
    schedule: Schedule | None = None,
) -> CategoricalDenoiser:
    r"""A masked language model, ``network(tokens)``, as the denoiser of an absorbing diffusion.

    Data are the model's own token ids; the process's mask is :math:`V` and is shown to the network as
    ``mask_token``. Which tokens are masked tells the level, so that the network needs none, and
    ``DiffusionCTMC`` has a bound on the log-probability of a text: the average over all orders of the tokens
    of the log-probability of each given those before it (in nats).

    Args:
        network: called with integers of shape (N, L); returns logits (N, L, V), or an object that has them as
            ``logits``.
        vocabulary: V, the number of token ids, the mask's included.
        mask_token: id of the mask, from 0 to V - 1.
        never: further ids that data never have, such as pads.
        schedule: survival probabilities; ``Rectified.full()`` by default, :math:`\alpha(t) = 1 - t`.

    Raises:
        ValueError: for ids outside the vocabulary, or anything but a module.

    References:
        Austin et al., arXiv 2107.03006; Sahoo et al. (MDLM), arXiv 2406.07524; Devlin et al., arXiv
        1810.04805.
    """
    check_module(network)
    check_positive_int("vocabulary", vocabulary, at_least=2)
    process = Absorbing(Rectified.full() if schedule is None else schedule, vocabulary)
    return CategoricalDenoiser(MaskedLogits(network, vocabulary, mask_token, tuple(never)), process)


class MaskedLogits(DefinedModule):
    """Logits over data of a network that has a mask among its tokens.

    Args:
        network: of tokens.
        vocabulary: number of token ids.
        mask_token: the id of the mask.
        never: further ids that data never have.
    """

    def __init__(
        self, network: nn.Module, vocabulary: int, mask_token: int, never: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        for name, value in [("mask_token", mask_token), *(("never", v) for v in never)]:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
                raise ValueError(
                    f"{name}: got {value!r}, expected a token id from 0 to {vocabulary - 1}"
                )
        if len({mask_token, *never}) == vocabulary:
            raise ValueError(f"never: got all {vocabulary} ids, expected some that data have")
        self.network, self.vocabulary = network, vocabulary
        self.mask_token, self.never = mask_token, tuple(never)

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """x (N, L), with V for the mask -> logits (N, L, V)."""
        del log_snr
        out = self.network(torch.where(x == self.vocabulary, self.mask_token, x))
        logits: Tensor = getattr(out, "logits", out)
        if tuple(logits.shape) != (*x.shape, self.vocabulary):
            raise ValueError(
                f"network: got logits of shape {tuple(logits.shape)}, expected {(*x.shape, self.vocabulary)}"
            )
        bad = torch.zeros(self.vocabulary, dtype=torch.bool, device=logits.device)
        bad[[self.mask_token, *self.never]] = True
        return logits.masked_fill(bad, NEVER)
