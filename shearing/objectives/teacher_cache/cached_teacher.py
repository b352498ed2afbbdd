"""A teacher that need not be there: what it said of rows is read, and it is asked only of rows that it never was.

Shapes: B sequences, S positions, N = B * S tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearing.data.documents import Inputs, sent
from shearing.data.mixture.origins import Origins
from shearing.errors import ShearingError, key
from shearing.objectives.teacher import Comparison
from shearing.objectives.teacher_cache.cache import TeacherCache
from shearing.objectives.teacher_cache.form import Form, KeptOnDevice
from shearing.objectives.teacher_cache.observer import Observer
from shearing.objectives.teacher_cache.said import Said, stacked


class CachedTeacher:
    """Says what a cache keeps; rows that are not in it are kept in the same form from what the teacher says now.

    Args:
        cache: of the rows that are trained on.
        domains: names, in the order of `Origins.domains`.
        observer: the teacher; None: it is not there, and rows that are not in the cache are refused.
    """

    def __init__(self, cache: TeacherCache, *, domains: Sequence[str], observer: Observer | None) -> None:
        self._cache, self._domains, self._observer = cache, domains, observer

    def targets(self, inputs: Inputs, *, following_BS: Tensor, origins: Origins) -> KeptTargets:
        """See `Teacher.targets`.

        Raises:
            ShearingError: a row that is not in the cache, where the teacher is not there; or one that is damaged.
        """
        assert origins.places is not None, "rows of a corpus"
        places = [(self._domains[domain], row) for domain, row in origins.places.tolist()]
        said = [self._cache.row(*place) for place in places]
        missing = [index for index, each in enumerate(said) if each is None]
        if missing:
            if self._observer is None:
                raise _refused(self._cache, place=places[missing[0]])
            rows = inputs.rows()
            for index in missing:
                one = slice(index, index + 1)
                [said[index]] = self._observer.said(rows[index], following_BS=following_BS[one], places=places[one])
        return KeptTargets(
            [each for each in said if each is not None], form=self._cache.conditions.form, device=following_BS.device
        )


class KeptTargets:
    """What is kept of a teacher's distributions for a micro-batch.

    Args:
        rows: B of S positions each.
        form: of what is kept.
        device: of the student.
    """

    def __init__(self, rows: Sequence[Said], *, form: Form, device: torch.device) -> None:
        arrays = stacked(rows)._asdict()
        self._kept = KeptOnDevice(
            **{name: sent(torch.from_numpy(array), device=device) for name, array in arrays.items()}
        )
        self._form = form

    def entropies(self) -> Tensor:
        """See `Targets.entropies`."""
        return self._kept.entropies

    @torch.no_grad()
    def compare(self, tokens: slice, log_student_CV: Tensor, labels_C1: Tensor) -> Comparison:
        """See `Targets.compare`."""
        del labels_C1  # what the teacher says of them is kept
        return self._form.compared(self._kept, tokens, log_student_CV)


def _refused(cache: TeacherCache, *, place: tuple[str, int]) -> ShearingError:
    domain, row = place
    return ShearingError(
        "cache",
        value=f"{cache.path} without row {row} of {domain}",
        allowed=f"all rows that are trained on, with {key('cache_missing')}=refuse",
        mend=f"set {key('cache_missing')}=compute and start again, or write the missing rows: shear data teacher, "
        "without --rows and --recipe",
    )
