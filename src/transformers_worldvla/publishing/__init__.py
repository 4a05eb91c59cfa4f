"""From a folder to a Hub repository: what it holds, whether it is complete, its card, the upload."""

from .card import fill_card
from .folder import Publication, inspect_folder
from .upload import upload_folder

__all__ = ["Publication", "fill_card", "inspect_folder", "upload_folder"]
