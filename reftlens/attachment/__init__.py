"""An edited transformers model, without a bridge: every forward pass of it is edited until the edit is detached."""

from reftlens.attachment.attaching import Attachment, attach

__all__ = ["Attachment", "attach"]
