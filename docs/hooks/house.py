"""The house as a picture: folders are rooms, on the floor that their imports put them on; arrows are imports."""

from collections.abc import Collection, Mapping
from html import escape

from docs.hooks.imports import ENGINE, ORDER, ROOT, engine_imports, folder, rank

Edge = tuple[str, str]
Place = tuple[int, int]
_WIDTH, _HEIGHT, _BESIDE, _FLOOR = 104, 34, 18, 74  # pixels: a room, between two of them, and from floor to floor
_PITCH, _EDGE = _WIDTH + _BESIDE, 12


def edges() -> set[Edge]:
    """Which folder imports which, in modules or in functions; what is for the type checker alone is left out."""
    found = {(folder(each.who), folder(each.whom)) for each in engine_imports() if each.kind != "typing"}
    return {(who, whom) for who, whom in found if who != whom and "neuroal_jax" not in (who, whom)}


def reduced(found: Collection[Edge]) -> set[Edge]:
    """The edges without those that a longer way of others makes anyway."""
    after: dict[str, set[str]] = {}
    for who, whom in found:
        after.setdefault(who, set()).add(whom)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*after.get(start, ())]
        while ahead:
            room = ahead.pop()
            ahead += after.get(room, set()) - seen
            seen.add(room)
        return seen

    return {(who, whom) for who, whom in found if not any(whom in reached(other) for other in after[who] - {whom})}


def picture() -> str:
    """The house as an SVG element, in the colours of the page around it."""
    found = edges()
    down = reduced({edge for edge in found if rank(edge[0]) >= rank(edge[1])})
    places = _places(down)
    width = max(x for x, _ in places.values()) + _WIDTH // 2 + _EDGE
    height = max(y for _, y in places.values()) + _HEIGHT + _EDGE
    upward = {edge for edge in found if rank(edge[0]) < rank(edge[1])}
    drawn = [
        *_arrows(places, down, "house-import"),
        *_arrows(places, upward, "house-upward"),
        *(_room(name, place, found) for name, place in places.items()),
    ]
    title = "The folders of neuroal_jax; each imports those that its arrows lead to, and what these import"
    return (
        f'<div class="house"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{title}" xmlns="http://www.w3.org/2000/svg"><defs><marker id="house-tip" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(drawn)}</svg></div>"
    )


def _places(down: Collection[Edge]) -> dict[str, Place]:
    """By room, the middle of its upper edge; the lowest floor is laid first, and rooms stand above what they import."""
    floors = [[room for room in floor if room != "neuroal_jax"] for floor in ORDER]
    middle = (max(len(floor) for floor in floors) * _PITCH - _BESIDE) // 2 + _EDGE
    places: dict[str, Place] = {}
    for number, floor in enumerate(floors):
        below = {room: [places[whom][0] for who, whom in down if who == room and whom in places] for room in floor}
        floor = sorted(floor, key=lambda room: sum(below[room]) / len(below[room]) if below[room] else middle)
        for who, whom in sorted(edge for edge in down if {*edge} <= {*floor}):  # beside the one that it imports
            floor.remove(who)
            floor.insert(floor.index(whom) + 1, who)
        left = middle - (len(floor) - 1) * _PITCH // 2
        y = _EDGE + (len(floors) - 1 - number) * _FLOOR
        places |= {room: (left + place * _PITCH, y) for place, room in enumerate(floor)}
    return places


def _arrows(places: Mapping[str, Place], found: Collection[Edge], kind: str) -> list[str]:
    """An arrow for each edge: to a neighbour on the same floor, to the next floor, or around the floors between."""
    middle = sum(x for x, _ in places.values()) // len(places)
    paths, lanes = [], dict.fromkeys((-1, 1), 0)
    for edge in sorted(found, key=lambda edge: abs(places[edge[0]][1] - places[edge[1]][1])):
        (x, y), (to_x, to_y) = (places[room] for room in edge)
        side = 1 if x + to_x >= 2 * middle else -1
        if y == to_y:
            side = 1 if to_x > x else -1
            path = f"M{x + side * _WIDTH // 2} {y + _HEIGHT // 2}H{to_x - side * _WIDTH // 2}"
        elif abs(y - to_y) == _FLOOR and y < to_y:
            path = f"M{x} {y + _HEIGHT}C{x} {to_y - 10} {to_x} {y + _HEIGHT + 10} {to_x} {to_y}"
        else:
            lanes[side] += 1
            between = [abs(at - middle) for at, floor in places.values() if min(y, to_y) < floor < max(y, to_y)]
            lane = middle + side * (max(between, default=0) + _WIDTH // 2 + 7 * lanes[side])
            shift = side * min(4 * lanes[side], _WIDTH // 2 - 8)
            out, into = (y + _HEIGHT + 6, to_y - 12) if y < to_y else (y - 12, to_y + _HEIGHT + 12)
            start, end = (y + _HEIGHT, to_y) if y < to_y else (y, to_y + _HEIGHT)
            out, into = out + lanes[side] % 5 * 3, into - lanes[side] % 5 * 3
            path = f"M{x + shift} {start}V{out}H{lane}V{into}H{to_x + shift}V{end}"
        paths.append(f'<path class="{kind}" d="{path}" marker-end="url(#house-tip)"/>')
    return paths


def _room(name: str, place: Place, found: Collection[Edge]) -> str:
    x, y = place
    modules = sum(1 for path in ENGINE if path.relative_to(ROOT / "neuroal_jax").with_suffix("").parts[0] == name)
    imports, importers = ([edge[1 - end] for edge in sorted(found) if edge[end] == name] for end in (0, 1))
    title = (
        f"{name} imports {', '.join(imports) or 'nothing of the project'}; imported by {', '.join(importers) or 'none'}"
    )
    return (
        f'<g class="house-room"><title>{escape(title)}</title>'
        f'<rect x="{x - _WIDTH // 2}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
        f'<text x="{x}" y="{y + 15}">{name}</text><text class="house-modules" x="{x}" y="{y + 28}">'
        f"{modules} module{'s' * (modules > 1)}</text></g>"
    )
