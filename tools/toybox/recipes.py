"""The sizes of a base: of its pictures, its models and the batches that they train on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Say what a base is made of."""

    size: int  # pixels a side of a picture
    pairs: float  # the share of pictures that show two things
    autoencoder: tuple[int, ...]  # channels by level; each level but the first halves the side
    latent_channels: int  # before those that say nothing are cut out
    unet: tuple[int, ...]  # channels by level
    plain_levels: int  # of the U-Net's first levels, without attention
    batches: dict[str, int]  # training -> pictures in a batch; the judge's are classes
    bank: int  # composites that are encoded once for the diffusion training

    @property
    def latent_side(self) -> int:
        """Latents a side."""
        return self.size >> (len(self.autoencoder) - 1)


#: The bundled base, for two CPU cores and four hours.
BUNDLED = Recipe(
    size=64,
    pairs=0.0,
    autoencoder=(16, 32, 64, 128),
    latent_channels=32,
    unet=(128, 192),
    plain_levels=0,
    batches={"autoencoder": 4, "classifier": 48, "diffusion": 48, "judge": 16},
    bank=24_000,
)
#: For a GPU and minutes. Four times the latents at the denoiser's old cost: the level that is new
#: has few channels and no attention.
LARGE = Recipe(
    size=128,
    pairs=1 / 3,
    autoencoder=(16, 32, 64, 128),
    latent_channels=16,
    unet=(32, 112, 192),
    plain_levels=1,
    batches={"autoencoder": 64, "classifier": 256, "diffusion": 768, "judge": 32},
    bank=60_000,
)
#: The same way at a size that a CPU core goes in seconds; to try it.
TINY = Recipe(
    size=128,
    pairs=1 / 3,
    autoencoder=(8, 8, 16, 16),
    latent_channels=4,
    unet=(16, 32, 32),
    plain_levels=1,
    batches={"autoencoder": 2, "classifier": 8, "diffusion": 16, "judge": 4},
    bank=64,
)
RECIPES = {"bundled": BUNDLED, "large": LARGE, "tiny": TINY}
