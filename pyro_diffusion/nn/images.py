"""The check of images that networks of several resolutions, or of patches, share."""

from torch import Tensor

from pyro_diffusion.validation import check_operand


def check_images(x: Tensor, channels: int, multiple: int, weight: Tensor) -> None:
    """Refuse all but images (N, channels, H, W) with H and W multiples of a number, and say which sizes fit.

    Raises:
        ValueError: naming the shape or size found, and for a size the nearest ones that fit.
    """
    if check_operand("x", x, weight).dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, {channels}, height, width)")
    height, width = x.shape[2:]
    if height < 1 or width < 1 or height % multiple or width % multiple:
        up, down = (
            [max(1, (size + more) // multiple) * multiple for size in (height, width)]
            for more in (multiple - 1, 0)
        )
        fits = f"padded to {up[0]} by {up[1]} these fit"
        if down != up and all(n <= m for n, m in zip(down, (height, width), strict=True)):
            fits += f", or cropped to {down[0]} by {down[1]}"
        raise ValueError(
            f"x: got images of {height} by {width}, expected multiples of {multiple}: {fits}"
        )
