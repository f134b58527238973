"""``StepEngine``: pictures that join and leave one loop between two calls of the model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future

from torch import Tensor

from engines.errors import OutOfMemoryError
from icexport.errors import UsageError
from icexport.graphs.profile import Profile, SizeRange
from icexport.host import memory
from icexport.runtime.needs import Needs
from icexport.runtime.rows import StepModels
from icexport.runtime.slots import Slot, StepRequest

_WAIT = 1.0
"""Seconds after which a thread that waits for another one's call looks whether it can make one itself."""


class StepEngine:
    """Draws pictures together, one call of ControlNet and UNet at a time.

    Each picture has all of its state in a slot of its own. A call holds the rows of several pictures, which may be at
    different steps, of different schedulers and strengths, with guidance and without. Between two calls, pictures come
    and go. Any thread may call any method; one at a time makes a call.

    Args:
        models: what predicts.
        profile: sizes that they take; one call holds at most ``batch.max`` pictures with guidance.
        factor: pixels per cell of the latents, at each side.
        needs: what calls are checked against before they get larger; None: nothing.
        pictures: how many pictures are drawn in turns; others wait for their first call.

    Raises:
        UsageError: the models do not take a single picture.
    """

    def __init__(
        self, models: StepModels, profile: Profile, factor: int, needs: Needs | None = None, pictures: int = 32
    ) -> None:
        if profile.batch.min > 1:
            raise UsageError(f"These engines take {profile.batch} pictures in a call, and no single one.")
        self._models, self._profile, self._factor, self._needs = models, profile, factor, needs
        self._pictures = pictures
        self._waiting: list[Slot] = []
        self._drawn: list[Slot] = []
        self._last: tuple[tuple[int, ...], int] = (), 0  # size of the last call, and its rows
        self._turns = itertools.count(1)
        self._calls = 0
        self._queue = threading.Lock()
        self._calling = threading.Lock()
        self._called = threading.Condition()

    def admit(self, request: StepRequest) -> Future[Tensor]:
        """Queue a picture.

        Returns:
            A ticket that gets its latents ``[1,C,h,w]`` float32, or its error. Its method ``cancel`` works until then.

        Raises:
            UsageError: the request does not fit the profile, or its parts do not fit together.
            OutOfMemoryError: what it holds between calls does not fit into the free memory.
        """
        self._check(request)
        slot = Slot(request, self._models.device)
        with self._queue:
            self._waiting.append(slot)
        return slot.ticket

    def step(self) -> int:
        """Make one call, for as many pictures as it holds: those whose last call is longest ago, of one size.

        Where an engine fails, every picture of the call gets the error, and no other one does.

        Returns:
            How many pictures it was for; 0: there is none to draw.
        """
        with self._calling:
            return self._step()

    def cancel(self, ticket: Future[Tensor]) -> bool:
        """Throw a picture away; tell whether it is so, also after a second time. False: it was done before."""
        return ticket.cancel()

    def retire(self, ticket: Future[Tensor]) -> bool:
        """End a picture with the latents that it has by now; without any, it is thrown away.

        Returns:
            Whether it was still to be drawn.
        """
        with self._calling:
            found = next((slot for slot in self._drawn if slot.ticket is ticket and not ticket.done()), None)
            if found is None or found.call == 0:
                return not ticket.done() and ticket.cancel()
            found.finish()
            return True

    def drive(self, tickets: Collection[Future[Tensor]], watch: Callable[[], None] = lambda: None) -> None:
        """Make calls, in turns with other threads that do so, until these pictures are done.

        Args:
            tickets: tickets of this engine.
            watch: called after every call. Where it raises an error, or the thread is interrupted, these pictures are
                thrown away.

        Raises:
            UsageError: a ticket is another engine's.
        """
        try:
            while not all(ticket.done() for ticket in tickets):
                self._turn()
                watch()
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise

    def calls(self, ticket: Future[Tensor]) -> int | None:
        """Return how many calls were made for a picture that is drawn; None: it is done, or another engine's."""
        if ticket.done():
            return None
        return next((slot.call for slot in (*self._drawn, *self._waiting) if slot.ticket is ticket), None)

    def _turn(self) -> None:
        seen = self._calls
        if not self._calling.acquire(blocking=False):
            with self._called:
                self._called.wait_for(lambda: self._calls != seen, _WAIT)
            return
        try:
            moved = self._step()
        finally:
            self._calling.release()
        if not moved:
            raise UsageError("There is nothing to draw, and a ticket that is not done: it is another engine's.")

    def _step(self) -> int:
        try:
            self._arrive()
            slots = self._choose()
            if slots:
                self._call(slots)
            return len(slots)
        finally:
            with self._called:
                self._calls += 1
                self._called.notify_all()

    def _arrive(self) -> None:
        """Let waiting pictures in, and those out that are done or thrown away."""
        for slot in self._drawn:
            if slot.done and not slot.ticket.done():  # the thread that made its last call was interrupted
                slot.finish()
        self._drawn = [slot for slot in self._drawn if not slot.ticket.done()]
        with self._queue:
            self._waiting = [slot for slot in self._waiting if not slot.ticket.done()]
            free = self._pictures - len(self._drawn)
            self._drawn += self._waiting[:free]
            self._waiting = self._waiting[free:]

    def _choose(self) -> list[Slot]:
        """Return the pictures of the next call."""
        chosen: list[Slot] = []
        rows = 0
        for slot in sorted(self._drawn, key=lambda slot: slot.turn):
            if chosen and slot.size != chosen[0].size:
                continue
            if not chosen or self._fits(slot, rows + slot.request.rows):
                chosen.append(slot)
                rows += slot.request.rows
        return chosen

    def _fits(self, slot: Slot, rows: int) -> bool:
        """Tell whether a call of so many rows of this picture's size is allowed, and fits into the free memory."""
        if rows > 2 * self._profile.batch.max:
            return False
        size, before = self._last
        if self._needs is None or (slot.size == size and rows <= before):
            return True
        height, width = slot.request.control_map.shape[1:]
        return rows * self._needs.sample * height * width <= memory.available()

    def _call(self, slots: list[Slot]) -> None:
        try:
            answers = self._models(slots)
        except Exception as error:  # noqa: BLE001  whatever it is: it belongs to those who wait for these pictures
            for slot in slots:
                slot.fail(error)
            return
        self._last = slots[0].size, sum(slot.request.rows for slot in slots)
        turn = next(self._turns)
        for slot, answer in zip(slots, answers, strict=True):
            slot.turn = turn
            try:
                slot.take(answer.predicted, answer.reading)
                if slot.done:
                    slot.finish()
            except Exception as error:  # noqa: BLE001  likewise
                slot.fail(error)

    def _check(self, request: StepRequest) -> None:
        """Refuse what would fail in a call, together with the pictures beside it; see ``admit``."""
        weights, profile = request.coefficients, self._profile
        noises, channels, height, width = request.noise.shape
        side = (height * self._factor, width * self._factor)
        prompts, tokens, features = request.prompt_embeds.shape
        models = self._models
        lengths = profile.text or SizeRange.parse(models.tokens or tokens)
        problems = [
            problem
            for fits, problem in (
                (noises == 1 + weights.draws, f"{noises} noises, and the scheduler takes {1 + weights.draws}"),
                (len(request.scales) == weights.calls, f"{len(request.scales)} scales for {weights.calls} calls"),
                (channels == models.channels, f"noise of {channels} channels, not {models.channels}"),
                (side[0] in profile.height, f"a height of {side[0]} px, not {profile.height}"),
                (side[1] in profile.width, f"a width of {side[1]} px, not {profile.width}"),
                (
                    tuple(request.control_map.shape) == (3, *side),
                    f"a control map of shape {tuple(request.control_map.shape)}, not {(3, *side)}",
                ),
                (prompts in (1, 2), f"{prompts} prompts, not 1 or, with guidance, 2"),
                (tokens in lengths, f"prompts of {tokens} tokens, not {lengths}"),
                (features == models.features, f"prompts of {features} features, not {models.features}"),
            )
            if not fits
        ]
        if problems:
            raise UsageError(f"This picture does not fit these engines: {'; '.join(problems)}.")
        profile.check_shape(*side)
        free = memory.available()
        if self._needs is not None and request.state_bytes > free:
            fitting = int(weights.calls * free / request.state_bytes)
            raise OutOfMemoryError(
                f"A picture of {weights.calls} calls holds {request.state_bytes / 1e9:.2f} GB between them, and "
                f"{free / 1e9:.2f} GB are free: at most {fitting} calls would fit"
            )
