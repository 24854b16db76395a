"""Why a file is not used as a picture: the one error of everything that looks at pictures, with one reason each."""

from sumizome.errors import DataError

__all__ = ["ImageRejected"]


class ImageRejected(DataError):
    """A file that is not used as a picture; `reason` is the word that reports count, the text the sentence.

    Reasons. File: `missing`, `no_permission`, `read_error` (the device's), `unreadable` (any other), `not_a_file`,
    `empty_file`, `file_too_large`, `unstable` (while it was read), `changed` (since ingest), `md5_mismatch` (with its
    record).
    Format: `not_an_image`, `format_not_supported`, `animated`. Damage: `truncated`, `undecodable`, `bad_chunk`,
    `broken_palette`. Size: `too_many_pixels`, `side_too_long`, `too_elongated`, `too_small`, `out_of_memory`.
    Content: `fully_transparent`.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(reason, sentence)  # both, so that it survives the way back from a worker process
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])
