"""Plays in which the model asks for its threads, in each language of `orchestra.protocols`."""

from __future__ import annotations

from orchestra.testing.scripted import Script

PLAN = " At once. <Parallel><Goal>both<Outline>1: add</Outline><Outline>2: multiply</Outline></Goal>"
ENDS = " 13 and 42</Conclusion></Parallel>\nanswer: 55"


def by_path(parts: dict[str, str], deeper: dict[str, str]) -> Script:
    """A script that says what stands beside the longest ending; threads other than the first know `deeper` too."""

    def script(context: str, path: tuple[int, ...]) -> str:
        own = parts | (deeper if path else {})
        return own[max((ending for ending in own if context.endswith(ending)), key=len)]

    return script


def multiverse(line: str = "") -> Script:
    """Two paths, the first of which opens a block of its own."""
    inner = " in parts <Parallel><Goal><Outline>1.1: 6</Outline><Outline>1.2: 7</Outline></Goal>"
    return by_path(
        {
            "?": PLAN,
            "\n1:": inner,
            "\n1.1:": " six</Path>",
            "\n1.2:": " seven, which is six and one</Path>",
            "\n2:": " 6 * 7 is 6 * 5 + 6 * 2, so 42</Path>",
            f"<Conclusion>{line}": ENDS,
        },
        {f"<Conclusion>{line}": " 13</Conclusion></Parallel> done</Path>"},
    )


THREADS = {
    "?": "<think>Well. <Parallel>\n<Outlines>\n<Outline>1: add</Outline>\n<Outline>2: multiply</Outline>\n</Outlines>",
    "\n1:": " 6 + 7 = 13</Thread>",
    "\n2:": " 6 * 7 = 6 * 5 + 12 = 42</Thread>",
    "</Thread>\n": "</Parallel> So both.</think>\nanswer: 13, 42",
}
NPR = {
    "?": "<guideline><plan>1: add</plan><plan>2: multiply</plan></guideline>",
    "<step>1:": " 6 + 7 = 13</step>",
    "<step>2:": " 6 * 7 = 42, I think</step>",
    "<takeaway>": " 13, 42</takeaway>\nanswer: 55",
}
PARALLEL_R1 = {
    "?": " Several looks. <Parallel>",
    "<Path>": " it is 42</Path>",
    "<Summary>": " all say 42</Summary>\nanswer: 42",
}
PARA_THINKER = {
    "<think1>": " six sevens</think1>",
    "<think2>": " seven sixes, 42</think2>",
    "<summary>": " agreed</summary>\nanswer: 42",
}
ASYNC = {
    "?": "First <FORK-1>6 + 7</FORK-1>",
    "</FORK-1>": "<FORK-2>6 * 7</FORK-2>",
    "</FORK-2>": " while they work, I hum.<JOIN-2>",
    "</RETURN-2>": " and <JOIN-1>",
    "</RETURN-1>": "\nanswer: 55",
    "\n\n6 + 7": "<RETURN>13</RETURN>",
    "\n\n6 * 7": " 6 * 5 and 6 * 2 make 30 + 12, so <RETURN>42</RETURN>",
}

IMPROVED = {"7?": " 41, I think\nanswer: 41", "anew.": " No: 42.\nanswer: 42", "at its end.": " It is 42.\nanswer: 42"}
PARTS = {
    "nothing else.": "1. tens\n2. ones",
    "others do the rest: tens": " 40",
    "others do the rest: ones": " 2",
    "complete answer.": " 40 and 2.\nanswer: 42",
}
JUDGED = {"9?": " 54\nanswer: 54", "Response 2: NUMBER": " Equal.\nResponse 1: 7\nResponse 2: 7"}

SCRIPTS: list[tuple[str, str, str, Script]] = [
    ("multiverse", "map_reduce(join='reuse')", "Sum, product of 6, 7?", multiverse()),
    ("multiverse_recompute", "map_reduce(join='recompute')", "Sum and product, 6 and 7?", multiverse()),
    ("multiverse_engine", "map_reduce(language='multiverse_engine')", "Sum/product of 6/7?", multiverse("\n")),
    ("thread_weaver", "threads", "6 and 7: sum, product?", by_path(THREADS, {})),
    ("npr", "map_reduce(language='npr')", "Of 6, 7 sum and product?", by_path(NPR, {})),
    ("parallel_r1", "map_reduce(language='parallel_r1', paths=2)", "6 times 7?", by_path(PARALLEL_R1, {})),
    ("para_thinker", "map_reduce(language='para_thinker', paths=2)", "6 x 7?", by_path(PARA_THINKER, {})),
    ("async_think", "async_think", "Both of 6 and 7?", by_path(ASYNC, {})),
    ("async_think_alone", "async_think(workers=1, shared=false)", "Both of 6, 7?",
     by_path(ASYNC | {"6 + 7": "<RETURN>13</RETURN>", "6 * 7": " 30 + 12, so <RETURN>42</RETURN>"}, {})),
    ("refine", "refine(rounds=1)", "What is 6 * 7?", by_path(IMPROVED, {})),
    ("pdr", "pdr(widths=[2], distiller='random_k', k=1)", "What is 6 x 7?", by_path(IMPROVED, {})),
    ("prompted", "map_reduce(plan='prompted')", "What is 6 by 7?", by_path(PARTS, {})),
    ("judged", "best_of(samples=2, scorer=judge(samples=1, temperature=0))", "What is 6 * 9?", by_path(JUDGED, {})),
]  # fmt: skip
"""Name, strategy, prompt and the model's part."""
