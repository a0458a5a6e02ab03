"""The texts that are compared where none are given."""

# Plain language, code, numbers, other scripts, and a text of several pages of the cache.
DEFAULT_PROMPTS = (
    "The lighthouse keeper counted the boats as they came in, and one was missing.",
    "def area(width, height):\n    return width * height\n\nprint(area(3, 4))  # 12\n",
    "2, 3, 5, 7, 11, 13, 17, 19, 23, 29; 1024 * 768 = 786432; 3.14159 / 2 = 1.570795",
    "Größe, naïve café, señor, Привет, Ελλάδα, 你好, こんにちは, 안녕하세요, 🙂 → ∞",
    '{"name": "Ada", "tags": ["x", "y"], "score": -1.5e3, "ok": true, "note": null}',
    "Once a year the whole village walked up to the old mill. The children ran ahead and the dogs "
    "ran after the children. At the top there was soup, and bread that was still warm. Grandmother "
    "Mira told the story of the flood again. Everybody knew it by heart, and nobody wanted her to "
    "leave anything out. When she came to the part with the floating bed, even the baker laughed, "
    "who never laughed. Then the sun went down behind the three hills, the lamps were lit, and one "
    "after the other they all walked home, slowly, because the way down is always the longer one.",
)
