"""List all kinds of damage."""

from hostile import copies, models, run_folders, texts, uploads

KINDS = (*uploads.KINDS, *texts.KINDS, *run_folders.KINDS, *models.KINDS, *copies.KINDS)
