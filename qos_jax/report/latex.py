"""The summary of an evaluation as a table for LaTeX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qos_jax.report.style import display_name
from qos_jax.report.summary_table import SummaryTable

_SPECIAL = str.maketrans(
    {each: f"\\{each}" for each in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def latex_table(results: Mapping[str, Any]) -> str:
    """Returns QoS by router and load as a ``tabular`` of the package booktabs, the best mean QoS on top.

    A cell is the mean over the seeds with half the width of its 95 % interval. The best of a load is bold, oracles are
    in italics and below all others.
    """
    table = SummaryTable(results["summary"])
    loads = " & ".join(f"{load:g}" for load in table.loads)
    kinds = list(table.kinds.values())
    lines = [
        "% \\usepackage{booktabs}",
        f"% {' '.join(str(results['command']).split())}",
        f"\\begin{{tabular}}{{l{'c' * len(table.loads)}}}",
        "\\toprule",
        f" & \\multicolumn{{{len(table.loads)}}}{{c}}{{QoS at load}} \\\\",
        f"router & {loads} \\\\",
        "\\midrule",
    ]
    for number, router in enumerate(table.kinds):
        if number and kinds[number] == "oracle" != kinds[number - 1]:
            lines.append("\\midrule")
        name = display_name(router).translate(_SPECIAL)
        name = f"\\textit{{{name}}}" if kinds[number] == "oracle" else name
        lines.append(" & ".join([name, *(_cell(table, router, load) for load in table.loads)]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _cell(table: SummaryTable, router: str, load: float) -> str:
    mean, half = table.cell("qos", load, router)
    shape = "mathbf" if router in table.best("qos", load) else "mathit" if table.kinds[router] == "oracle" else ""
    mean = f"\\{shape}{{{mean}}}" if shape else mean
    return f"${mean} \\pm {half}$" if half else f"${mean}$"
