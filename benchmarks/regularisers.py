"""Each regulariser beside `mosbach` on the rows of small_data.py: mean, standard deviation, worst seed, seconds, memory.

`ft` and `mosbach` are the recipes of small_data.py, run again beside the others so that seconds and memory compare. Each method has
the values its paper or its authors' code starts from, or its default here; none was tuned. PYTHONPATH=. python benchmarks/regularisers.py
"""

from __future__ import annotations

from grid import Entry, against, costs, differences, go, plot, table


def beside(**ingredient: dict[str, object]) -> Entry:
    """The ingredient behind mosbach's own: gradients are clipped before it sees them."""
    return Entry("mosbach", last=tuple({name: values} for name, values in ingredient.items()))


METHODS = {
    "ft": Entry("ft"),
    "mosbach": Entry("mosbach"),
    "mixout 0.1": beside(mixout={"p": 0.1}),
    "mixout 0.7": beside(mixout={"p": 0.7}),
    "l2sp": beside(l2sp={}),
    "prior_decay": beside(prior_decay={"weight_decay": 0.01}),
    "rec_adam": beside(rec_adam={}),
    "child_tuning F": beside(child_tuning={"mode": "free", "p": 0.3, "where": ["backbone"]}),
    "child_tuning D": beside(child_tuning={"mode": "data", "p": 0.3}),
    "gmt": beside(gmt={}),
    "noisy_tune": beside(noisy_tune={}),
    "isobn": beside(isobn={}),
    "emoe": beside(emoe={}),
    "r_drop": beside(r_drop={}),
    "smart": beside(smart={}),
    "freelb": beside(freelb={}),
    "neftune": beside(neftune={}),
    "label_smoothing": beside(label_smoothing={}),
    "sam": beside(sam={}),
    "lisa": beside(lisa={}),
}

if __name__ == "__main__":
    runs = go("regularisers", METHODS)
    print(table(runs))
    print(differences(against(runs, "mosbach")))
    print(costs(runs, ("ft", "mosbach")))
    plot("regularisers", runs)
