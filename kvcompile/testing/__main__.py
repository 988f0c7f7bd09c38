"""What the laws cover, and one law on one thing again.

    python -m kvcompile.testing                            registered things x laws, opt-outs
    python -m kvcompile.testing NAME LAW --seed N          that law on that thing
"""

import argparse

from kvcompile.testing import LAWS, absent, check, exempt, pairs, registered


def table() -> str:
    """Every law with how many things of its kind it is tried on, and every opt-out."""
    lines, outs = [], []
    for kind, things in registered().items():
        for one in (x for x in LAWS if x.kind == kind):
            every = [thing for thing in things.values() if one.applies(thing)]
            reasons = {x.name: exempt(x, one.name) for x in every if exempt(x, one.name)}
            lines.append(f"{kind:7} {len(every) - len(reasons):3}  {one.name}: {one.statement}")
            outs += [f"{name} {one.name}: {reason}" for name, reason in reasons.items()]
    known = sum(map(len, registered().values()))
    return "\n".join([*lines, "", f"{known} registered things, {len({x.name for x in LAWS})} laws, "
                      f"{len(list(pairs()))} pairs, {len(outs)} opt-outs", *outs])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvcompile.testing", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?")
    parser.add_argument("law", nargs="?")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=0)
    given = parser.parse_args()
    if not given.name:
        print(table())
        return
    for one, name, thing in pairs():
        if name == given.name and given.law in (None, one.name):
            why = absent(one.target)
            if not why:
                check(one, thing, given.seed, given.examples)
            print(f"{name} {one.name}: {f'not tried: {why}' if why else 'holds'}")


if __name__ == "__main__":
    main()
