"""Arrays that users give as components: read as tensors, whoever's they are, and bases made orthonormal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

_LEAST_OVERLAP = 1e-5  # cosine of subspaces that were orthogonalised in float32, whatever they are stored in
_ROUNDS = 8  # of Newton and Schulz; each squares the error


def is_array(value: Any) -> bool:
    """True for a tensor, a NumPy array, and what turns itself into one."""
    return isinstance(value, Tensor) or hasattr(value, "__array__")


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor as it is, without its history; another array as a tensor in host memory, which shares its numbers.

    Raises:
        TypeError: torch has no such dtype, or it is no array.
    """
    if isinstance(value, Tensor):
        return value.detach()
    try:
        array = np.ascontiguousarray(value)  # torch knows no negative strides
        if array.dtype.name == "bfloat16":  # an extension of NumPy's, as JAX has it
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.as_tensor(array, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected a tensor or a NumPy array of real numbers, got {type(value).__name__} ({error})."
        ) from None


class Bases(Sequence[Tensor]):
    """The bases (D, k) of several subspaces in their own dtypes, copied. A direction (D,) is a basis (D, 1).

    Raises:
        TypeError: ``given`` is no list of arrays of real numbers.
    """

    def __init__(self, given: Any, name: str = "bases") -> None:
        self.name = name
        self._given = tuple(_basis(one, f"{name}[{i}]") for i, one in enumerate(_listed(given, name)))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self._given[index]

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        shown = [str(tuple(basis.shape)) for basis in self._given[:3]] + ["..."] * (len(self) > 3)
        return f"<{len(self)} bases {', '.join(shown)}>"

    def check(self, width: int) -> None:
        """Raise ValueError unless these are bases of mutually orthogonal subspaces of R^``width``."""
        if not len(self):
            raise ValueError(f"{self.name}: empty; give at least one (D, k) matrix.")
        for i, basis in enumerate(self._given):
            if basis.ndim != 2 or basis.shape[0] != width or not 1 <= basis.shape[1] <= width:
                shape = tuple(basis.shape)
                raise ValueError(f"{self.name}[{i}]: expected shape ({width}, k) with 1 ≤ k ≤ D, got {shape}.")
            if not basis.isfinite().all():
                raise ValueError(f"{self.name}[{i}]: holds NaN or inf.")
        assert self.orthonormal

    @cached_property
    def orthonormal(self) -> tuple[Tensor, ...]:
        """Orthonormal bases of the same subspaces, in float64, orthogonal to each other to the last digit.

        Bases in half precision are orthogonal up to their rounding only. That is taken from all of them alike, as these
        are the orthonormal matrices nearest to them.

        Raises:
            ValueError: columns are dependent or subspaces overlap by more than their dtypes round.
        """
        alone = [self._span(i) for i in range(len(self))]
        for i, basis in enumerate(alone):
            for j, other in enumerate(alone[:i]):
                overlap = (basis.T @ other).abs().max().item()
                rounding = max(torch.finfo(self._given[k].dtype).eps for k in (i, j))
                if overlap > max(_LEAST_OVERLAP, rounding):
                    raise ValueError(
                        f"{self.name}[{j}] and {self.name}[{i}] overlap (largest cosine {overlap:.2g}); subspaces must "
                        "be mutually orthogonal. Orthogonalise them, or give their sum as one subspace."
                    )
        return _nearest_orthonormal(alone, self.name)

    @cached_property
    def digest(self) -> tuple[str, ...]:
        """A hash of every basis, as it was given."""
        return tuple(
            sha256(f"{basis.dtype}{tuple(basis.shape)}".encode() + basis.double().numpy().tobytes()).hexdigest()
            for basis in self._given
        )

    def _span(self, i: int) -> Tensor:
        """An orthonormal basis of one subspace, in float64."""
        given = self._given[i]
        basis = given.double()
        if not (lengths := basis.norm(dim=0)).all():
            column = int((lengths == 0).nonzero()[0])
            raise ValueError(f"{self.name}[{i}]: column {column} is zero, which is no direction; leave it out.")
        q, r = torch.linalg.qr(basis / lengths.clamp_min(torch.finfo(basis.dtype).tiny))
        sizes = torch.linalg.svdvals(r)
        rounding = max(max(basis.shape) * torch.finfo(basis.dtype).eps, 2 * torch.finfo(given.dtype).eps)
        if sizes[-1] <= rounding * sizes[0]:  # what is left of a column would be the rounding of its dtype
            raise ValueError(f"{self.name}[{i}]: its columns are linearly dependent, as far as {given.dtype} tells.")
        return q


def _listed(given: Any, name: str) -> Sequence[Any]:
    """The list of arrays that was given; a lone direction is a list of one."""
    if is_array(given):
        given = as_tensor(given, name)
        if given.ndim == 2:
            raise TypeError(
                f"{name}: expected a list of (D, k) matrices or (D,) directions, got one array of shape "
                f"{tuple(given.shape)}; write [basis] for one subspace, list(rows) for a direction per row."
            )
        return [given] if given.ndim == 1 else list(given)
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise TypeError(f"{name}: expected a list of (D, k) matrices or (D,) directions, got {type(given).__name__}.")
    return given


def _basis(given: Any, name: str) -> Tensor:
    basis = as_tensor(given, name)
    if basis.is_complex():
        raise TypeError(f"{name}: expected real numbers, got dtype {basis.dtype}.")
    basis = basis.to("cpu", copy=True)
    basis = basis if basis.is_floating_point() else basis.double()
    return basis[:, None] if basis.ndim == 1 else basis


def _nearest_orthonormal(bases: Sequence[Tensor], name: str) -> tuple[Tensor, ...]:
    """The orthonormal matrices nearest to orthonormal ones (D, k) that are almost orthogonal to each other."""
    frame = torch.cat(list(bases), dim=1)
    one = torch.eye(frame.shape[1], dtype=frame.dtype, device="cpu")
    for _ in range(_ROUNDS):
        off = one - frame.T @ frame
        if off.abs().max() <= 4 * len(frame) ** 0.5 * torch.finfo(frame.dtype).eps:
            break
        frame = frame + frame @ off / 2
    if not off.abs().max() <= 1e-12:  # many small overlaps add up; NaN, too
        raise ValueError(
            f"{name}: together they overlap by more than their dtypes round; subspaces must be mutually orthogonal. "
            "Orthogonalise them, or give their sum as one subspace."
        )
    return frame.split([basis.shape[1] for basis in bases], dim=1)
