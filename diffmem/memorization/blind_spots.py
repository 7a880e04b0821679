"""What a rule cannot see, said where its verdict stands."""

from __future__ import annotations

from diffmem.html_report import level
from diffmem.memorization.rules import Rule

_UNSEEN = {
    "pixels": "distances of pixels do not see copies that were shifted, cropped, {mirrored}recolored or made brighter",
    "aligned": "alignment does not see copies that were turned by more than a little, cropped by more than a fifth, or "
    "put beside other things",
    "hash": "perceptual hashes do not see copies that were cropped, {mirrored}rotated or put beside other things",
}
_NETWORK = (
    "{name} features see what their network was trained to see: it may take two pictures of one kind of thing for a "
    "copy, and miss details"
)


def blind_spots(rule: Rule, *, flip: bool, looked: bool) -> tuple[str, ...]:
    """Sentences, without a period, on what the verdict does not cover.

    Args:
        rule: The rule in use.
        flip: Whether mirrored images were compared.
        looked: Whether there was a second look.
    """
    kind = rule.features if rule.features in _UNSEEN else None
    seen = (_UNSEEN[kind] if kind else _NETWORK).format(mirrored="" if flip else "mirrored, ", name=rule.features)
    if looked and rule.metric != "aligned":
        seen += "; the second look, which does, looks at the 8 nearest training images alone"
    spots = [seen]
    if rule.name == "ratio":
        spots.append(
            "d1/d2 does not see copies of a training image that the set holds in several versions, and grows more "
            "lenient the fewer training images there are"
            if rule.metric != "aligned"
            else "the threshold on aligned images was chosen on CIFAR-10: rule='calibrated' finds one for these images"
        )
    elif rule.name == "similarity":
        spots.append("a threshold means another share of false alarms on other images: a hold-out set says which")
    else:
        spots.append(
            f"of unseen images {level(rule.alarms)} are called copies too: the count holds that many false ones, and "
            "the p-values say which are surest, as far as the hold-out images are like unseen generated ones"
        )
    return tuple(spots)
