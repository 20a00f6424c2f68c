"""How many drafts a step verifies: `DraftDepth` keeps to the depth that pays best and tries the others now and then."""

from __future__ import annotations

from collections import deque
from statistics import median, median_low

SHARE = 0.01  # of the time may be lost in trials, in the long run
FEW, SHARE_OF_FEW = 4, 0.02  # in batches up to so many, where a wrong depth costs most and texts do not average out
PATIENCE, LEAST = 3, 0.25  # each depth lost so many trials in a row: from there on the share falls, to that part of it
FREE_TOKENS = 32  # a step of so many tokens takes hardly longer than one of few: where to begin with nothing known
FIRST_STEPS, FIRST_REQUESTS = 8, 8  # measured before the first trial: steps, and requests in them
TRIAL_STEPS, TRIAL_REQUESTS = 16, 32  # after which a trial that is neither won nor lost is decided
DOUBT = 1  # requests that count as if all their drafts had been accepted, so that bad luck ends no trial
MARGIN = 1.02  # by which another depth must be better
LOOK_STEPS = 8  # between two looks at whether the best depth still is what it was
WORSE = 0.8  # of what it was at the last trial: so little from the best depth means that the world has changed


class DraftDepth:
    """Chooses among `depths` (ascending) by the tokens per second that each has brought, for each size of batch.

    What a draft is worth depends on how often it is accepted and on what verifying costs: nearly nothing while a step
    waits for the weights, much where it computes all the time. Both change with the model, the machine, the text, and
    as graphs are compiled, so they are measured while serving. The depth changes how fast tokens come, and no token.

    The best depth so far is used until what the last trial has cost is a small share of the time since; then the next
    depth has its turn. A trial ends as soon as that depth can no longer be better, mostly after two steps. Where trial
    after trial is lost, the share falls.
    """

    def __init__(self, depths: tuple[int, ...]) -> None:
        assert depths and list(depths) == sorted(set(depths))
        self.depths = depths
        self._of_size: dict[int, _Trials] = {}
        self._size = 0  # of the newest plan
        self._num_made = 0  # drafts that the step before has made for each request

    @property
    def deepest(self) -> int:
        return self.depths[-1]

    def choose(self, num_requests: int) -> int:
        """The depth for a step of so many requests."""
        if len(self.depths) == 1:
            return self.depths[0]
        self._size = self._size_of(max(1, num_requests))
        trials = self._of_size.get(self._size)
        if trials is None:
            trials = self._of_size[self._size] = _Trials(
                self.depths, self._first_depth(num_requests), SHARE_OF_FEW if self._size <= FEW else SHARE
            )
        return trials.choose()

    def observe(self, num_requests: int, depth: int, seconds: float, num_tokens: int) -> None:
        """Take in a step, in the order of the plans: the requests that decoded, the drafts that each was to verify, and
        the tokens that came of it. `seconds` 0: it was not only that, so that its time says nothing."""
        num_made, self._num_made = self._num_made, depth
        if seconds > 0 and num_requests:
            trials = self._of_size.get(self._size_of(num_requests))
            if trials is not None:
                trials.observe(depth, seconds, num_requests, num_tokens, num_made >= depth)
        elif (trials := self._of_size.get(self._size)) is not None:
            trials.pass_by(depth)

    def _size_of(self, num_requests: int) -> int:
        """Batches up to the next power of two are taken together; where sizes vary about one, they stay together."""
        if 0.75 * self._size / 2 < num_requests <= 1.25 * self._size:
            return self._size
        return 1 << (num_requests - 1).bit_length()

    def _first_depth(self, num_requests: int) -> int:
        """Where to begin with a new size: as with the nearest one."""
        if self._of_size:
            near = min(self._of_size, key=lambda size: abs(size.bit_length() - self._size.bit_length()))
            return self._of_size[near].best
        return max((each for each in self.depths if num_requests * (1 + each) <= FREE_TOKENS), default=self.depths[0])


class _Samples:
    """The newest steps of one depth."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.seconds: deque[float] = deque(maxlen=16)
        self.counts: deque[tuple[int, int]] = deque(maxlen=64)  # requests and tokens of steps that had all drafts

    def add(self, seconds: float, num_requests: int, num_tokens: int, had_drafts: bool) -> None:
        self.seconds.append(seconds)
        if had_drafts:
            self.counts.append((num_requests, num_tokens))

    @property
    def num_requests(self) -> int:
        return sum(num_requests for num_requests, _ in self.counts)

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.counts)

    def rate(self) -> float:
        """Tokens per second and request. The median: a step that was held up by something else is no measure."""
        return self.num_tokens / max(1, self.num_requests) / median(self.seconds)

    def highest_rate(self) -> float:
        """What the rate may turn out to be."""
        num_tokens = self.num_tokens + DOUBT * (1 + self.depth)
        return num_tokens / (self.num_requests + DOUBT) / median_low(self.seconds)


class _Trials:
    """The depths for one size of batch: the best one, and perhaps one on trial."""

    def __init__(self, depths: tuple[int, ...], first: int, share: float) -> None:
        self.best = first
        self._share = share
        self._recent = _Samples(first)
        self._queue = deque(depth for depth in depths if depth != first)
        self._hopeless: dict[int, float] = {}  # seconds of a step, of depths that are slow beyond what drafts can bring
        self._credit = 0.0  # seconds that may be lost; below 0 nothing is tried
        self._num_lost = 0  # trials in a row
        self._trial: _Samples | None = None
        self._is_glance = False  # one step to see whether a hopeless depth is still that slow
        self._is_shown = False  # that step is planned
        self._expected = 0.0  # the rate of the best depth when the last trial was lost
        self._is_after_trial = False  # it was lost, and no step of the best depth has come since
        self._num_steps = 0  # of the trial
        self._gained = 0.0  # tokens per request of these
        self._num_unmeasured = 0  # steps of it whose time says nothing
        self._num_since_look = 0  # steps
        self._left = 0  # steps after which the trial ends in any case

    def choose(self) -> int:
        if self._trial is None or self._is_shown:
            return self.best
        self._is_shown = self._is_glance
        return self._trial.depth

    def pass_by(self, depth: int) -> None:
        """Take in a step whose time says nothing."""
        if self._trial is not None:
            self._num_unmeasured += depth == self._trial.depth
            self._count_down()

    def observe(self, depth: int, seconds: float, num_requests: int, num_tokens: int, had_drafts: bool) -> None:
        recent, trial = self._recent, self._trial
        tokens = num_tokens / num_requests
        if depth == self.best:
            if self._is_after_trial and not had_drafts:  # lost too, for what was tried in the step before
                self._credit -= max(0.0, median(recent.seconds) - tokens / recent.rate())
            self._is_after_trial = False
            recent.add(seconds, num_requests, num_tokens, had_drafts)
        if trial is None:
            self._credit += self._share * self._confidence() * seconds
            self._num_since_look += 1
            if self._num_since_look >= LOOK_STEPS and recent.seconds:
                self._num_since_look = 0
                if recent.rate() < WORSE * self._expected:
                    self._credit, self._expected, self._num_lost = 0.0, 0.0, 0
            is_due = self._credit >= 0 and len(recent.seconds) >= FIRST_STEPS
            if is_due and recent.num_requests >= FIRST_REQUESTS:
                self._begin(num_requests)
            return
        if depth == trial.depth:
            trial.add(seconds, num_requests, num_tokens, had_drafts)
            self._num_steps += 1
            self._gained += tokens
            self._judge(trial, recent.rate())
        self._count_down()

    def _confidence(self) -> float:
        """By how much less is tried the longer nothing has been better."""
        return max(LEAST, min(1.0, PATIENCE * len(self._queue) / max(1, self._num_lost)))

    def _begin(self, num_requests: int) -> None:
        self._trial = _Samples(self._queue.popleft())
        self._is_glance = self._trial.depth in self._hopeless
        self._num_steps = self._num_unmeasured = 0
        self._gained = 0.0
        self._left = 2 * max(TRIAL_STEPS, TRIAL_REQUESTS // num_requests) + 4

    def _judge(self, trial: _Samples, rate: float) -> None:
        """Go on, or end the trial against the `rate` of the best depth."""
        if self._is_glance:
            if (1 + trial.depth) / trial.seconds[0] < rate:
                self._end(False)
            else:
                self._is_glance = self._is_shown = False  # not hopeless any more: a trial as others
        elif len(trial.seconds) > 1 and trial.highest_rate() < rate:
            self._end(False)
        elif len(trial.counts) >= TRIAL_STEPS and trial.num_requests >= TRIAL_REQUESTS:
            self._end(trial.rate() > MARGIN * rate)

    def _count_down(self) -> None:
        self._left -= 1
        if self._trial is not None and self._left <= 0:
            self._end(False)

    def _end(self, is_won: bool) -> None:
        trial, recent = self._trial, self._recent
        assert trial is not None
        self._trial = None
        self._is_shown = False
        if is_won:
            self._queue.append(self.best)
            self.best, self._recent = trial.depth, trial
            self._credit = self._expected = 0.0
            self._num_lost = 0
            return
        self._num_lost += 1
        self._queue.append(trial.depth)
        self._is_after_trial = True
        self._expected = recent.rate()
        if not self._num_steps:
            self._credit -= self._num_unmeasured * median(recent.seconds)  # as if each had taken twice as long
            return
        seconds, rate = median_low(trial.seconds), recent.rate()
        # A single look may have been held up by something else.
        seconds = min(seconds, self._hopeless.pop(trial.depth, seconds))
        loss = max(0.0, seconds - self._gained / self._num_steps / rate)  # of a step, against the best depth
        if (1 + trial.depth) / seconds < rate:
            self._hopeless[trial.depth] = seconds
            self._credit -= loss  # as if one look had shown it, as it will from now on
        else:
            self._credit -= loss * (self._num_steps + self._num_unmeasured + 1)  # one more is planned already
