"""`design-train gallery`: one image through ReLU, Sign and every published kernel, as one figure to look at."""

from collections.abc import Sequence

from design_lightning.commands.options import Options


def main(command: str, args: Sequence[str]) -> None:
    """Draws the figure."""
    options = Options(command, "Draws one image through ReLU, Sign and every published threshold kernel.")
    options.add_argument("--image", required=True, help="the image's file")
    options.add_argument("--out", default="gallery.png", help="the figure: .png, .pdf or .svg (%(default)s)")
    options.add_argument(
        "--kernel", action="append", default=[], help="a kernel's JSON file to draw as well; may be given several times"
    )
    options.add_argument(
        "--max_side", type=int, default=256, help="a larger image is reduced to it (%(default)s pixels)"
    )
    given = options.parse_args(args)
    from design_lightning.kernels import ThresholdKernel
    from design_lightning.kernels.search import check_figure, draw_gallery, read_grey

    check_figure(given.out)
    kernels = {name: ThresholdKernel.named(name) for name in ThresholdKernel.names()}
    kernels |= {kernel.name: kernel for kernel in map(ThresholdKernel.of, given.kernel)}
    image = read_grey(given.image, given.max_side)
    title = (
        "one image, standardised as by a batch norm, through each activation (3-D kernels: mean over their channels)"
    )
    draw_gallery(image, kernels, given.out, title)
    print(f"written: {given.out}")
