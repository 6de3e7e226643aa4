"""What the tables of the knowledge tasks hold."""

from __future__ import annotations

from phaselens.plugin import Column, TableSpec, interval_help

SHARE = "share of items"
_CONDITION = Column("condition", str, None, "the condition's name; `baseline` is the model as it is")
_LAYER = Column("layer", int, "index", "the layer that the condition concerns, 0-based")
_KIND = Column("kind", str, None, "contextual, parametric, or all")
_INTERVAL = interval_help("items", paired=True)

TABLES = (
    TableSpec(
        "items",
        (
            Column("item", str, None, "the question's id"),
            _CONDITION,
            _LAYER,
            Column("seed", int, None, "which repeat of a control"),
            Column("kind", str, None, "contextual or parametric"),
            Column("answer", str, None, "the right option"),
            Column(
                "chosen",
                str,
                None,
                "the option with the largest log-probability; null where two are equal",
            ),
            Column("correct", int, None, "1 if that is the right one, else 0"),
            Column("correct_per_token", int, None, "the same from the mean over each option's tokens"),
            Column("p", float, "probability", "of the right option among the options"),
            Column("p_per_token", float, "probability", "the same from the mean over each option's tokens"),
            Column("log_odds", float, "nats", "ln P(right) − ln P(any other option)"),
            Column("log_odds_per_token", float, "nats", "the same from the mean over each option's tokens"),
            Column("chance", float, "probability", "1 over the number of options"),
            Column("n_tokens", int, "tokens", "of the question with its longest option"),
        ),
        "a row per question and condition",
    ),
    TableSpec(
        "accuracy",
        (
            Column("condition", str, None, "the condition's name and the kind"),
            Column("of", str, None, "the condition's name alone"),
            _LAYER,
            _KIND,
            Column("n", int, "items", "asked; one that could not be scored counts as not right"),
            Column("coverage", float, SHARE, "that could be scored"),
            Column("accuracy", float, SHARE, "right: the most probable option is the answer"),
            Column("ci_low", float, SHARE, "95 % interval, Wilson"),
            Column("ci_high", float, SHARE, "95 % interval, Wilson"),
            Column("chance", float, SHARE, "mean of 1 over the number of options"),
            Column(
                "same_answer",
                float,
                SHARE,
                "right if the commonest right answer were given to every question",
            ),
            Column("accuracy_per_token", float, SHARE, "from the mean over each option's tokens"),
            Column("p", float, "probability", "of the right option among the options, mean over items"),
            Column("log_odds", float, "nats", "ln P(right) − ln P(any other option), mean over items"),
            Column("n_seeds", int, "seeds", "repeats of a control, averaged item by item first"),
        ),
        "a row per condition and kind",
    ),
    TableSpec(
        "degradation",
        (
            _CONDITION,
            _LAYER,
            Column("kind", str, None, "contextual, parametric, all, or `contextual − parametric`"),
            Column("n", int, "items", "scored both ways; of the smaller kind in a difference of kinds"),
            Column("lost_accuracy", float, SHARE, "baseline − condition"),
            Column("accuracy_low", float, SHARE, f"{_INTERVAL}; null where all changed alike"),
            Column("accuracy_high", float, SHARE, f"{_INTERVAL}; null where all changed alike"),
            Column("lost_log_odds", float, "nats", "baseline − condition"),
            Column("log_odds_low", float, "nats", _INTERVAL),
            Column("log_odds_high", float, "nats", _INTERVAL),
            Column("lost_of_all", float, "share", "lost_accuracy over what the baseline has above chance"),
            Column(
                "status",
                str,
                None,
                "ok; baseline at chance: nothing to lose; below chance: more than all is lost",
            ),
        ),
        "what a condition takes away, item by item; a row per condition and kind",
    ),
    TableSpec(
        "summary",
        (
            Column("accuracy", float, SHARE, "at baseline"),
            Column("chance", float, SHARE, "mean of 1 over the number of options"),
            Column("coverage", float, SHARE, "that could be scored at baseline"),
            Column("contextual", float, SHARE, "accuracy at baseline"),
            Column("parametric", float, SHARE, "accuracy at baseline"),
            Column("n", int, "items", "asked"),
            Column("sha256", str, None, "of the file"),
        ),
        "a row per model",
    ),
)
