"""A saved folder that is complete but for its hashes and the disk: training goes on while a thread sees to them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping

from torch import nn

from dsee_scale.checkpoint.folder import NewFolder, open_folder
from dsee_scale.checkpoint.masks import masks_now, note_files
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import FormatError


class UnfinishedState:
    """A training state whose files are written, but not hashed, on the disk, and under its name: `finish` does it.

    A thread goes ahead with the first two meanwhile. Until `finish` returns, what was in the folder before is there.
    """

    def __init__(self, module: nn.Module, new: NewFolder, kept: Mapping[str, int]) -> None:
        self._module, self._new, self._masks = module, new, masks_now(new.partition, module, kept)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._settle, name="dsee-checkpoint", daemon=True)
        self._thread.start()

    def _settle(self) -> None:
        try:
            self._new.settle()
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Collective. Wait for the files, and put the folder in its place.

        Raises:
            FormatError: writing failed, e.g. no space is left; what was there before stays.
        """
        new = self._new
        self._thread.join()
        try:
            with raise_on_all_ranks(new.partition):
                if self._error is not None:
                    raise self._error
            new.commit()
        except BaseException:
            new.discard()
            raise
        with contextlib.suppress(
            FormatError
        ):  # storage that shows a folder late: the next masks are written anew
            note_files(self._module, self._masks, open_folder(new.folder, (new.kind,)))
