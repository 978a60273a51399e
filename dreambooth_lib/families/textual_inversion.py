"""A new word of the text encoders: an identifier that is learnt by an embedding of its own.

As in textual inversion (arXiv 2208.01618), beside which the weights are tuned (pivotal tuning).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from dreambooth_lib.families.base import Family

#: In a folder of LoRA weights: the embeddings [1, width] of their word, one a text encoder. Other
#: tools know the text encoders of Stable Diffusion and Flux by these names too.
TOKEN_FILE = "word/token.safetensors"
_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class TokenError(ValueError):
    """A word that cannot be a new one."""


class TrainableTokenEmbedding(torch.nn.Module):
    """An embedding whose last row can train while all others stay."""

    def __init__(self, embedding: torch.nn.Embedding):
        super().__init__()
        self.embedding = embedding
        self.word = torch.nn.Parameter(embedding.weight[-1].detach().clone().float())

    @property
    def weight(self) -> torch.Tensor:
        """All rows as they are frozen: what asks for it wants its type or device."""
        return self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [...] to embeddings [..., width]."""
        frozen = self.embedding(ids)
        is_word = (ids == self.embedding.num_embeddings - 1).unsqueeze(-1)
        return torch.where(is_word, self.word.to(frozen.dtype), frozen)


def add_token(family: "Family", word: str, like: str | None = None) -> None:
    """Make ``word`` a token of its own, its embedding at first that of ``like``, ready to train.

    Raises :class:`TokenError` for a word that a tokenizer has already.
    """
    for tokenizer, encoder, _ in _texts(family):
        start = tokenizer(like, add_special_tokens=False).input_ids if like else []
        said = tokenizer.tokenize(word)
        if len(said) == 1 and said != [tokenizer.unk_token]:
            raise TokenError(
                f"'{word}' is a word that the base has already, and train_token learns a new one; "
                f"choose another identifier, such as '<{word}>'."
            )
        tokenizer.add_tokens([word])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        embedding = encoder.get_input_embeddings()
        embedding.requires_grad_(False)
        if start:
            embedding.weight[-1] = embedding.weight[start].mean(0)
        encoder.set_input_embeddings(TrainableTokenEmbedding(embedding))


def save_token(family: "Family", folder: Path) -> None:
    """Write a trained word's embeddings."""
    (folder / TOKEN_FILE).parent.mkdir()
    trained = {name: encoder.get_input_embeddings() for _, encoder, name in _texts(family)}
    rows = {name: one.word.detach()[None].clone() for name, one in trained.items()}
    save_file(rows, folder / TOKEN_FILE)


@torch.no_grad()
def merge_token(family: "Family") -> None:
    """Write a trained word into the text encoders, as plain models."""
    for _, encoder, _ in _texts(family):
        trained = encoder.get_input_embeddings()
        trained.embedding.weight[-1] = trained.word
        encoder.set_input_embeddings(trained.embedding)


@torch.no_grad()
def load_token(family: "Family", folder: str | Path, word: str) -> None:
    """Add a word that was saved, as plain models."""
    saved = load_file(Path(folder) / TOKEN_FILE)
    add_token(family, word)
    for _, encoder, name in _texts(family):
        encoder.get_input_embeddings().word.copy_(saved[name][0])
    merge_token(family)


def usage_lines(adapter: "type[Family]", model: str | Path, word: str) -> list[str]:
    """The Python that gives a ``pipeline`` of plain diffusers the word that ``model`` learnt.

    ``model`` is a folder or, if there is none, a name on the Hub.
    """
    lines = ["from safetensors.torch import load_file"]
    if Path(model).is_dir():
        lines += [f'word = load_file("{Path(model) / TOKEN_FILE}")']
    else:
        lines += ["from huggingface_hub import hf_hub_download"]
        lines += [f'word = load_file(hf_hub_download("{model}", "{TOKEN_FILE}"))']
    for name in adapter.encoder_names:
        encoder, tokenizer = f"pipeline.{name}", f"pipeline.{_tokenizer_of(name)}"
        row = f'word["{_KEYS[name]}"]'
        if adapter.loads_textual_inversion:
            parts = f"text_encoder={encoder}, tokenizer={tokenizer}"
            lines += [f'pipeline.load_textual_inversion({row}, token="{word}", {parts})']
        else:
            lines += [
                f'{tokenizer}.add_tokens("{word}")',
                f"{encoder}.resize_token_embeddings(len({tokenizer}), mean_resizing=False)",
                f"{encoder}.get_input_embeddings().weight.data[-1] = {row}[0]",
            ]
    return lines


def _tokenizer_of(encoder_name: str) -> str:
    return encoder_name.replace("text_encoder", "tokenizer")


def _texts(family: "Family") -> list[tuple[Any, Any, str]]:
    """Tokenizer, text encoder and the latter's name elsewhere, of those that can train."""
    pipeline = family.pipeline
    names = [name for name in family.encoder_names if getattr(pipeline, name) is not None]
    return [(getattr(pipeline, _tokenizer_of(n)), getattr(pipeline, n), _KEYS[n]) for n in names]
