"""Notice a model that has collapsed to one score for every pair.

The hardest-negative loss of B captions is `sum_i max_j [m + s_ij - s_ii]_+ + sum_j max_i [m + s_ij - s_jj]_+`. Where
all scores are equal every maximum is the margin m, so the loss stands at `2 m B`, and it tends to stay there: from a
batch whose hardest negatives all look alike the gradients of positives and negatives cancel.
"""

from __future__ import annotations

from typing import Any

PATIENCE = 300
"""Steps that the loss must stay at the margin. A healthy run passes that value on its way down in tens of steps."""
TOLERANCE = 0.02
"""Relative distance from the margin that still counts as being there."""

ADVICE = "what helps: a longer warm-up (--warmup-epochs), a smaller batch (--batch-size), or a lower --lr"


class CollapseDetector:
    """Counts the steps that the loss has stood at `2 * margin * batch`, and speaks once.

    Parameters
    ----------
    margin
        Margin of the hinge loss.
    """

    def __init__(self, margin: float) -> None:
        self.margin = margin
        self.steps = 0
        self.told = False

    def update(self, loss_per_caption: float, steps: int, *, hardest: bool) -> str | None:
        """Take in the mean loss of the last `steps` steps.

        Parameters
        ----------
        loss_per_caption
            Sum of the losses divided by the captions they were summed over.
        steps
            How many steps that was.
        hardest
            Whether the hardest negatives were taken; the sum of hinges has another resting place.

        Returns
        -------
        str | None
            What to tell the user, the first time that the collapse is certain.
        """
        resting = 2 * self.margin
        if not hardest or abs(loss_per_caption - resting) > TOLERANCE * resting:
            self.steps = 0
            return None
        self.steps += steps
        if self.told or self.steps < PATIENCE:
            return None
        self.told = True
        return (
            f"the loss has stood at 2 x margin = {resting:g} per caption for {self.steps} steps: the model has "
            f"collapsed to one score for every pair; {ADVICE}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Position, as JSON values."""
        return {"steps": self.steps, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` left off."""
        self.steps, self.told = state["steps"], state["told"]
