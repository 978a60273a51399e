"""Define what the commands ``evaluate`` and ``results`` take."""

import argparse
from pathlib import Path


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", type=Path, nargs="?", help="a folder of subjects (default: the bundled ones)"
    )
    parser.add_argument(
        "--download", action="store_true", help="download the DreamBooth data set there first"
    )
    parser.add_argument(
        "--base", default="toybox", help="the base model to train (default: %(default)s)"
    )
    parser.add_argument(
        "--encoders",
        nargs="+",
        help="Hub ids, folders, 'photos' (DINOv2 and SigLIP 2) or 'paper' "
        "(DINO and CLIP, with the paper's rows); default: photos, or the bundled base's scorer",
    )
    parser.add_argument(
        "--drift-prompts",
        nargs="+",
        default=[],
        help="prompts whose images should stay like the base's; {noun} is the class noun",
    )
    parser.add_argument("--images-per-prompt", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="training steps (default: the base's)")
    parser.add_argument("--batch-size", type=int, help="for training (default: the base's)")
    parser.add_argument(
        "--class-images", type=int, help="class images per subject (default: the base's)"
    )
    parser.add_argument(
        "--scorer", help="the CLIP that scores validation images (default: the base's)"
    )
    parser.add_argument(
        "--vlm",
        help="a vision-language model as another judge: a Hub id, a folder, or a name in the API",
    )
    parser.add_argument("--vlm-url", help="its OpenAI-compatible API: https://api.openai.com/v1")
    parser.add_argument(
        "--vlm-key-env",
        metavar="NAME",
        default="OPENAI_API_KEY",
        help="the name of the environment variable with the API's key",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/evaluation"),
        help="the folder to write to (default: %(default)s)",
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=("add", "table"), help="save results, or only write the table again"
    )
    parser.add_argument("places", type=Path, nargs="*", help="folders of runs or evaluations")
    parser.add_argument("--title", default="", help="what to call it (default: from its config)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("docs/results"),
        help="the folder of all results (default: %(default)s)",
    )
