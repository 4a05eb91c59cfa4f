"""The plan that `--list` prints: what is there, what is missing, and roughly how many CPU hours of one core that takes.

Rates were measured on a 2-core machine without a GPU (docs/experiments.md). Evaluation is an upper bound: every episode
is taken to run to the end of its step budget.
"""

from collections.abc import Sequence

from rows import Row, Training
from store import Budget, Store

from transformers_worldvla.cli.closed_loop import parse_numbers, parse_trials
from transformers_worldvla.evaluation.libero_suites import STEP_BUDGETS

TRAINING_SECONDS_A_TOKEN = 0.29e-3  # forward, backward and update of the small decoder, float32
PHYSICS_SECONDS, PICTURE_SECONDS, RESET_SECONDS = 0.020, 0.141, 0.22  # a step, a frame, an episode
ANSWER_SECONDS, CAUSAL_SECONDS = 0.10, 0.04  # all actions of a chunk in parallel; more under the naive mask, an action
FRAME_SECONDS, FRAMES_ROW = 0.2, 1600  # an imagined frame; of the validation episodes, both horizons
PROMPT_TOKENS = 20


def describe_plan(store: Store, rows: Sequence[Row]) -> str:
    """Rows in the order in which they are run; what several share is counted with the first of them."""
    lines, total = [f"{'row':<24}{'training':<48}{'train':>7}{'measure':>9}  state"], 0.0
    first: dict[Training, str] = {}
    counted: set[tuple[Training, str]] = set()
    for row in rows:
        chain = [row.training] if row.training.start_from is None else [row.training.start_from, row.training]
        untrained = [each for each in chain if each not in first and not store.is_trained(each)]
        for each in chain:
            first.setdefault(each, row.name)
        training = sum(training_hours(each, store.budget) for each in untrained)
        fresh = [measure for measure in row.measures if (row.training, measure) not in counted]
        counted |= {(row.training, measure) for measure in fresh}
        measuring = sum(measuring_hours(store, row.training, measure) for measure in fresh)
        total += training + measuring
        state = "trained" if store.is_trained(row.training) else "untrained"
        if "success" in row.measures:
            state += f", {len(store.episodes(row.training))} of {episodes_a_row(store.budget)} episodes"
        if first[row.training] != row.name:
            state += f", shares the run of {first[row.training]}"
        lines.append(f"{row.name:<24}{store.name(row.training):<48}{training:>6.1f}h{measuring:>8.1f}h  {state}")
    return "\n".join([*lines, f"at most {total:.0f} hours of one CPU core are left"])


def episodes_a_row(budget: Budget) -> int:
    return len(parse_numbers(budget.tasks, "--tasks")) * len(parse_trials(budget.trials))


def measuring_hours(store: Store, training: Training, measure: str) -> float:
    """What is left of one measure of a trained model; timing an answer costs nothing to speak of."""
    budget = store.budget
    if measure == "success":
        left = max(0, episodes_a_row(budget) - len(store.episodes(training)))
        return success_hours(training, left, budget.max_steps or STEP_BUDGETS[budget.suite])
    if measure == "frames" and store.imagined(training) is None:
        return FRAMES_ROW * FRAME_SECONDS / 3600
    return 0.0


def training_hours(training: Training, budget: Budget) -> float:
    """Of the run itself; one that it starts from costs extra, once."""
    tokens = sum(sample_tokens(kind, training) for kind in training.kinds) / len(training.kinds)
    return budget.steps * budget.batch_size * tokens * TRAINING_SECONDS_A_TOKEN / 3600


def sample_tokens(kind: str, training: Training) -> int:
    """Length of a sample of LIBERO's arm (7 dimensions)."""
    side = training.px // 16
    picture, action = side * side + side + 4, 9
    if kind == "action":
        return PROMPT_TOKENS + training.history * picture + training.num_actions * action
    return PROMPT_TOKENS + (picture + action if kind == "world" else training.history * picture) + picture


def success_hours(training: Training, episodes: int, step_budget: int) -> float:
    """Of so many episodes in the simulator."""
    actions = training.num_actions
    answer = ANSWER_SECONDS + (CAUSAL_SECONDS * actions if training.action_attention == "causal" else 0)
    chunk = actions * PHYSICS_SECONDS + min(actions, training.history) * PICTURE_SECONDS + answer
    return episodes * (RESET_SECONDS + step_budget / actions * chunk) / 3600
