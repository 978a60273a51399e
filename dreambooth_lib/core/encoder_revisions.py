"""Tell which revision of an encoder on the Hub to read."""

#: Of models whose main branch has pickled weights only: the commit in which the Hub's own converter
#: has added the same weights as safetensors.
_REVISIONS = {"openai/clip-vit-base-patch32": "c237dc49a33fc61debc9276459120b7eac67e7ef"}


def revision_of(model_id: str) -> str:
    """Return the revision of an encoder on the Hub that has safetensors."""
    return _REVISIONS.get(model_id, "main")
