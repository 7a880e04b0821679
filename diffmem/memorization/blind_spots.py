"""What a rule cannot see, said where its verdict stands."""

from __future__ import annotations

from diffmem.html_report import level
from diffmem.memorization.rules import Rule

_UNSEEN = {
    "pixels": "pixel distances do not detect copies that were shifted, cropped, {mirrored}recolored or made brighter",
    "aligned": "alignment does not detect copies that were rotated by more than a little, cropped by more than a "
    "fifth, or placed beside other content",
    "hash": "perceptual hashes do not detect copies that were cropped, {mirrored}rotated, or placed beside other "
    "content",
}
_NETWORK = (
    "{name} features see what their network was trained to see: two images of the same kind of thing may count as a "
    "copy, and details may be missed"
)


def blind_spots(rule: Rule, *, flip: bool, looked: bool, of: int | None = None) -> tuple[str, ...]:
    """Sentences, without a period, on what the verdict does not cover.

    Args:
        rule: The rule in use.
        flip: Whether mirrored images were compared.
        looked: Whether there was a second look.
        of: At how many images, those with the lowest scores; None: at all.
    """
    kind = rule.features if rule.features in _UNSEEN else None
    seen = (_UNSEEN[kind] if kind else _NETWORK).format(mirrored="" if flip else "mirrored, ", name=rule.features)
    if looked and rule.metric != "aligned":
        seen += "; the second look does, but only among the 8 nearest training images"
        if of is not None:
            seen += f", and of the {of:,} images with the lowest scores"
    spots = [seen]
    if rule.name == "ratio":
        spots.append(
            "d1/d2 does not detect copies of a training image that the set holds in several versions, and it is more "
            "lenient the fewer training images there are"
            if rule.metric != "aligned"
            else "the threshold on aligned images was chosen on CIFAR-10: rule='calibrated' finds one for these images"
        )
    elif rule.name == "similarity":
        spots.append("a threshold gives a different false-alarm rate on other images: a holdout set measures it")
    else:
        spots.append(
            f"{level(rule.alarms)} of unseen images are called copies too, so the count includes that many false ones; "
            "the p-values rank the copies by certainty, as far as the holdout images are like unseen generated ones"
        )
    return tuple(spots)
