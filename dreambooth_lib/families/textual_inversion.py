"""Textual inversion (arXiv 2208.01618): add a new token and train its embedding.

The weights may train along with it (pivotal tuning).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from dreambooth_lib.core.errors import KitError
from dreambooth_lib.core.user_text import python_string

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

#: In a folder of LoRA weights: the token's embeddings [1, width], one for each text encoder, by
#: the names that other tools use for the text encoders of Stable Diffusion and Flux.
TOKEN_FILE = "word/token.safetensors"
_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class TokenError(KitError, ValueError):
    """A word that cannot become a new token."""


class TrainableTokenEmbedding(torch.nn.Module):
    """An embedding of which only the last row trains."""

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        self.embedding = embedding
        self.word = torch.nn.Parameter(embedding.weight[-1].detach().clone().float())

    @property
    def weight(self) -> torch.Tensor:
        """Return the frozen rows, for code that reads the dtype or device."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed token ids [...] as [..., width]."""
        frozen = self.embedding(ids)
        is_word = (ids == self.embedding.num_embeddings - 1).unsqueeze(-1)
        return torch.where(is_word, self.word.to(frozen.dtype), frozen)


def add_token(family: "Family", word: str, like: str | None = None) -> None:
    """Add ``word`` as a trainable token, initialized with the mean embedding of ``like``.

    Raises :class:`TokenError` for a word that is one token already.
    """
    for tokenizer, encoder, _ in _tokenizers_and_encoders(family):
        start = tokenizer(like, add_special_tokens=False).input_ids if like else []
        tokens = tokenizer.tokenize(word)
        if len(tokens) == 1 and tokens != [tokenizer.unk_token]:
            raise TokenError(
                f"'{word}' is a word that the base has already, and train_token learns a new one; "
                f"choose another identifier, such as '<{word}>'."
            )
        tokenizer.add_tokens([word])
        # Released encoders have 2 there: they pool at the highest token, which the new one now is.
        _pooling(encoder).eos_token_id = encoder.config.eos_token_id = tokenizer.eos_token_id
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embedding = encoder.get_input_embeddings()
        embedding.requires_grad_(False)
        if start:
            embedding.weight[-1] = embedding.weight[start].mean(0)
        encoder.set_input_embeddings(TrainableTokenEmbedding(embedding))


def _pooling(encoder: Any) -> Any:
    """Return what pools a prompt's end: since transformers 5.6 the text encoder itself."""
    return getattr(encoder, "text_model", encoder)


def save_token(family: "Family", folder: Path) -> None:
    """Save the trained token's embeddings in ``folder``."""
    (folder / TOKEN_FILE).parent.mkdir()
    rows = {
        key: encoder.get_input_embeddings().word.detach()[None].clone()
        for _, encoder, key in _tokenizers_and_encoders(family)
    }
    save_file(rows, folder / TOKEN_FILE)


@torch.no_grad()
def merge_token(family: "Family") -> None:
    """Write the trained token into the text encoders' embeddings, as plain models."""
    for _, encoder, _ in _tokenizers_and_encoders(family):
        trained = encoder.get_input_embeddings()
        trained.embedding.weight[-1] = trained.word
        encoder.set_input_embeddings(trained.embedding)


@torch.no_grad()
def load_token(family: "Family", folder: str | Path, word: str) -> None:
    """Load a saved token as ``word`` into the text encoders, which stay plain models."""
    saved = load_file(Path(folder) / TOKEN_FILE)
    add_token(family, word)
    for _, encoder, key in _tokenizers_and_encoders(family):
        encoder.get_input_embeddings().word.copy_(saved[key][0])
    merge_token(family)


def usage_lines(family: "type[Family]", model: str | Path, word: str) -> list[str]:
    """Return Python lines that load the token of ``model`` into a diffusers ``pipeline``.

    ``model`` is a folder, or a name on the Hub where there is no such folder.
    """
    lines, token = ["from safetensors.torch import load_file"], python_string(word)
    if Path(model).is_dir():
        lines += [f"word = load_file({python_string(Path(model) / TOKEN_FILE)})"]
    else:
        lines += ["from huggingface_hub import hf_hub_download"]
        lines += [f'word = load_file(hf_hub_download({python_string(model)}, "{TOKEN_FILE}"))']
    for name in family.encoder_names:
        encoder, tokenizer = f"pipeline.{name}", f"pipeline.{_tokenizer_of(name)}"
        row = f'word["{_KEYS[name]}"]'
        if family.loads_textual_inversion:
            parts = f"text_encoder={encoder}, tokenizer={tokenizer}"
            lines += [f"pipeline.load_textual_inversion({row}, token={token}, {parts})"]
        else:
            lines += [
                f"{tokenizer}.add_tokens({token})",
                f"{encoder}.resize_token_embeddings(len({tokenizer}), mean_resizing=False)",
                f"{encoder}.get_input_embeddings().weight.data[-1] = {row}[0]",
            ]
        if family.denoiser_name != "unet" or len(family.encoder_names) > 1:  # uses what is pooled
            pooling = f'getattr({encoder}, "text_model", {encoder})'
            lines += [f"{pooling}.eos_token_id = {tokenizer}.eos_token_id"]
    return lines


def _tokenizer_of(encoder_name: str) -> str:
    return encoder_name.replace("text_encoder", "tokenizer")


def _tokenizers_and_encoders(family: "Family") -> list[tuple[Any, Any, str]]:
    """Return tokenizer, text encoder and key in the token's file of each that may train."""
    pipeline = family.pipeline
    names = [name for name in family.encoder_names if getattr(pipeline, name) is not None]
    return [(getattr(pipeline, _tokenizer_of(n)), getattr(pipeline, n), _KEYS[n]) for n in names]
