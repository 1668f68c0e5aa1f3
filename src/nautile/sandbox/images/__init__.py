"""Images of containers: content-addressed layers in a store, built, composed, and used lazily or whole. See docs/sandbox.md."""

from nautile.sandbox.images.blobs import Credentials
from nautile.sandbox.images.chunks import Fetched
from nautile.sandbox.images.store import Description, ImageStore

__all__ = ["Credentials", "Description", "Fetched", "ImageStore"]
