"""Words of the invented shop: what its products are, what is special about them, what one chooses.

Invariants, which the tests check: attributes of one group are told apart by the reward's fuzzy
match (no two alike by more than 85%), and so are the values of an axis; no sentence in this module
contains an attribute of any group.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One kind of product.

    Attributes:
        query: the shelf a shopper would look on; goals name the product by it.
        tail: the last parts of the category path, divided by " > ".
        noun: what it is called in titles.
        low: cheapest usual price in dollars.
        high: dearest usual price in dollars.
    """

    query: str
    tail: str
    noun: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Group:
    """Kinds of products that share attributes and options.

    Attributes:
        category: one of WebShop's five.
        head: the first parts of the category path, divided likewise.
        lines: its kinds of products.
        traits: attributes that stand before the product ("cruelty free face cream").
        parts: attributes that follow "with".
        uses: attributes that follow "for".
        axes: name of an option → its possible values; the first axis comes with pictures.
    """

    category: str
    head: str
    lines: tuple[Line, ...]
    traits: tuple[str, ...]
    parts: tuple[str, ...]
    uses: tuple[str, ...]
    axes: tuple[tuple[str, tuple[str, ...]], ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


_COLORS = _words(
    "Black, White, Navy, Red, Olive, Grey, Pink, Purple, Yellow, Orange, Brown, Beige, Teal, Ivory"
)
_CLOTHES = _words("X-Small, Medium, Large, Big Tall, Petite")
_OUNCES = _words("2 Ounce, 12 fl oz, Half Gallon, Travel Tube, Refill Pouch")
_PACKS = _words("Single, Twin Pack, Box of Six, Case of 24, Sampler")

GROUPS = (
    Group(
        "beauty",
        "Beauty & Personal Care > Skin Care",
        (
            Line("facial cleansers", "Face > Cleansers", "Face Wash", 7, 28),
            Line("face moisturizers", "Face > Moisturizers", "Face Cream", 9, 60),
            Line("eye masks", "Eyes > Masks", "Eye Gel Mask", 6, 35),
            Line("body lotions", "Body > Lotions", "Body Lotion", 6, 30),
        ),
        _words("cruelty free, paraben free, dermatologist tested, long lasting, alcohol free"),
        _words("hyaluronic acid, green tea, coconut oil, aloe vera, shea butter"),
        _words("sensitive skin, dark circles, fine lines, daily moisture"),
        (("Scent", _words("Lavender, Citrus, Unscented, Rose, Eucalyptus")), ("Size", _OUNCES)),
    ),
    Group(
        "beauty",
        "Beauty & Personal Care > Hair Care",
        (
            Line("shampoos", "Shampoo & Conditioner > Shampoos", "Hair Shampoo", 7, 34),
            Line("hair masks", "Treatments > Hair Masks", "Hair Mask", 8, 40),
            Line("hair oils", "Styling > Oils & Serums", "Hair Serum", 9, 45),
            Line("leave-in conditioners", "Treatments > Leave-In", "Conditioner Spray", 7, 26),
        ),
        _words("sulfate free, color safe, plant based, salon grade, quick absorbing"),
        _words("argan oil, keratin complex, rosemary extract, biotin blend, jojoba esters"),
        _words("curly hair, thinning hair, damaged ends, itchy scalp"),
        (("Scent", _words("Vanilla, Mint, Coconut, Fragrance-Free, Mango")), ("Size", _OUNCES)),
    ),
    Group(
        "electronics",
        "Electronics > Audio",
        (
            Line("earbud headphones", "Headphones > Earbuds", "Sport Earbuds", 18, 140),
            Line("over-ear headphones", "Headphones > Over-Ear", "Studio Headphones", 25, 260),
            Line("portable speakers", "Speakers > Portable", "Portable Speaker", 20, 190),
            Line("sound bars", "Home Audio > Sound Bars", "Soundbar Speaker", 45, 330),
        ),
        _words("noise cancelling, water resistant, fast charging, hands free, ultra compact"),
        _words("wireless bluetooth, carrying case, stereo sound, touch controls, voice assistant"),
        _words("video calls, outdoor running, long flights, home theater"),
        (("Color", _COLORS), ("Style", _words("Classic, With Charger, Bundle, Renewed Edition"))),
    ),
    Group(
        "electronics",
        "Electronics > Accessories & Supplies",
        (
            Line("hdmi cables", "Cables > Video Cables", "HDMI Cable", 6, 50),
            Line("phone chargers", "Chargers > Wall Chargers", "Phone Charger", 8, 45),
            Line("usb hubs", "Computers > Hubs", "USB Hub Adapter", 12, 80),
            Line("tv mounts", "Mounts > TV Mounts", "TV Wall Mount", 18, 120),
        ),
        _words("gold plated, high speed, heavy duty, tangle free, plug and play"),
        _words("aluminum alloy, braided nylon, led indicator, surge protection, magnetic tip"),
        _words("gaming consoles, security cameras, conference rooms, car dashboards"),
        (
            ("Color", _COLORS),
            ("Size", _words("3 Feet, 10ft Long, Half Metre, XL Reach, Pocket Length")),
        ),
    ),
    Group(
        "electronics",
        "Electronics > Computers & Accessories",
        (
            Line("keyboards", "Input Devices > Keyboards", "Computer Keyboard", 15, 150),
            Line("computer mice", "Input Devices > Mice", "Computer Mouse", 9, 90),
            Line("laptop stands", "Laptop Accessories > Stands", "Laptop Stand", 14, 85),
            Line("webcams", "Cameras > Webcams", "Webcam Camera", 19, 160),
        ),
        _words("low profile, energy efficient, easy install, silent operation, fully adjustable"),
        _words("rgb backlight, usb receiver, anodized finish, privacy cover, wrist cushion"),
        _words("remote work, left handers, online classes, travel bags"),
        (("Color", _COLORS), ("Style", _words("Corded, Rechargeable, Dual Mode, Starter Kit"))),
    ),
    Group(
        "fashion",
        "Clothing, Shoes & Jewelry > Men > Clothing",
        (
            Line("men's t-shirts", "Shirts > T-Shirts", "Men's T-Shirt", 9, 45),
            Line("men's polos", "Shirts > Polos", "Men's Polo Shirt", 14, 60),
            Line("men's hoodies", "Fashion Hoodies & Sweatshirts", "Men's Hoodie", 19, 85),
            Line("men's shorts", "Shorts > Casual", "Men's Shorts", 12, 55),
        ),
        _words("machine washable, slim fit, moisture wicking, wrinkle resistant, big and tall"),
        _words("cotton blend, zipper pockets, reflective trim, bamboo fiber, polyester spandex"),
        _words("daily wear, gym workouts, summer travel, golf courses"),
        (("Color", _COLORS), ("Size", _CLOTHES)),
    ),
    Group(
        "fashion",
        "Clothing, Shoes & Jewelry > Women > Clothing",
        (
            Line("women's dresses", "Dresses > Casual", "Women's Dress", 17, 110),
            Line("women's blouses", "Tops > Blouses", "Women's Blouse", 12, 60),
            Line("women's leggings", "Leggings", "Women's Leggings", 10, 65),
            Line("women's cardigans", "Sweaters > Cardigans", "Women's Cardigan", 18, 90),
        ),
        _words("hand wash, relaxed fit, tummy control, buttery soft, breathable knit"),
        _words("lace trim, side pockets, rayon fabric, ribbed cuffs, faux pearl buttons"),
        _words("beach vacations, evening parties, maternity months, yoga practice"),
        (("Color", _COLORS), ("Size", _CLOTHES)),
    ),
    Group(
        "fashion",
        "Clothing, Shoes & Jewelry > Shoes",
        (
            Line("walking sneakers", "Athletic > Walking", "Walking Sneakers", 24, 130),
            Line("sandals", "Sandals > Flats", "Flat Sandals", 14, 80),
            Line("ankle boots", "Boots > Ankle", "Ankle Boots", 32, 180),
            Line("house slippers", "Slippers", "House Slippers", 11, 50),
        ),
        _words("slip resistant, wide width, shock absorbing, vegan friendly, feather light"),
        _words("rubber sole, memory foam, adjustable strap, steel toe, fleece lining"),
        _words("hiking trails, nursing shifts, wedding guests, rainy weather"),
        (("Color", _COLORS), ("Size", _words("6, 7.5, 9 Wide, 11 Narrow, 13"))),
    ),
    Group(
        "garden",
        "Home & Kitchen > Furniture",
        (
            Line("console tables", "Tables > Sofa & Console Tables", "Console Table", 60, 420),
            Line("bookcases", "Home Office Furniture > Bookcases", "Bookcase Shelf", 45, 360),
            Line("nightstands", "Bedroom Furniture > Nightstands", "Bedside Nightstand", 38, 260),
            Line("accent chairs", "Chairs > Accent Chairs", "Accent Chair", 85, 520),
        ),
        _words("easy assembly, space saving, eco friendly, scratch proof, mid century"),
        _words("solid wood, metal legs, storage drawers, tempered glass, charging station"),
        _words("living room, small apartments, home office, entry hallways"),
        (("Color", _COLORS), ("Size", _words("24 Inches, Extra Wide, Compact, Tall, Set of Two"))),
    ),
    Group(
        "garden",
        "Home & Kitchen > Bedding",
        (
            Line("throw blankets", "Blankets & Throws > Throws", "Throw Blanket", 14, 90),
            Line("pillow covers", "Decorative Pillows > Covers", "Pillow Covers", 9, 45),
            Line("bed sheets", "Sheets > Sheet Sets", "Bed Sheet Set", 22, 140),
            Line("window curtains", "Window Treatments > Curtains", "Curtain Panels", 18, 110),
        ),
        _words("super soft, fade resistant, double sided, pet friendly, oeko certified"),
        _words("hidden zipper, tassel fringe, microfiber fill, linen weave, blackout lining"),
        _words("guest bedroom, kids room, camping trips, hot sleepers"),
        (("Color", _COLORS), ("Size", _words("Twin, Queen, California King, Crib, Full XL"))),
    ),
    Group(
        "garden",
        "Home & Kitchen > Kitchen & Dining",
        (
            Line("food storage jars", "Storage > Jars", "Storage Jars", 11, 60),
            Line("cutting boards", "Cutlery > Cutting Boards", "Cutting Board", 12, 75),
            Line("water bottles", "Travel & To-Go > Water Bottles", "Water Bottle", 10, 55),
            Line("baking pans", "Bakeware > Pans", "Baking Pan", 11, 65),
        ),
        _words("dishwasher safe, bpa free, leak proof, non toxic, stackable design"),
        _words("stainless steel, bamboo lid, silicone seal, ergonomic handle, etched scale"),
        _words("meal prep, school lunch, picnic days, gift giving"),
        (("Color", _COLORS), ("Size", _words("Mini, 16 Ounce, 2 Quart, Jumbo, Party Set"))),
    ),
    Group(
        "grocery",
        "Grocery & Gourmet Food > Snack Foods",
        (
            Line("granola bars", "Bars > Granola", "Granola Bars", 6, 38),
            Line("trail mix", "Nuts & Seeds > Trail Mix", "Trail Mix", 8, 44),
            Line("crackers", "Crackers > Assorted", "Snack Crackers", 5, 30),
            Line("popcorn", "Popcorn > Popped", "Popped Popcorn", 5, 32),
        ),
        _words("gluten free, low sodium, non gmo, peanut free, keto diet"),
        _words("sea salt, dark chocolate, chia seeds, real honey, toasted quinoa"),
        _words("office breaks, road trips, movie nights, toddler snacks"),
        (
            (
                "Flavor Name",
                _words("Cinnamon, Maple Pecan, Sour Cream, Original, Smoky Barbecue, Huckleberry"),
            ),
            ("Size", _PACKS),
        ),
    ),
    Group(
        "grocery",
        "Grocery & Gourmet Food > Beverages",
        (
            Line("ground coffee", "Coffee > Ground", "Ground Coffee", 9, 48),
            Line("herbal tea", "Tea > Herbal", "Herbal Tea Bags", 6, 34),
            Line("protein powders", "Protein Drinks > Powders", "Protein Powder", 19, 85),
            Line("hot cocoa", "Cocoa > Mixes", "Hot Cocoa Mix", 6, 32),
        ),
        _words("caffeine free, sugar free, fair trade, usda organic, dairy free"),
        _words("natural flavors, pea protein, probiotic cultures, monk fruit, ashwagandha root"),
        _words("morning routine, muscle recovery, iced recipes, bedtime calm"),
        (
            (
                "Flavor Name",
                _words("Hazelnut, Salted Caramel, Toffee, Plain, Chai Spice, Raspberry"),
            ),
            ("Size", _PACKS),
        ),
    ),
)
"""All groups; every line of every group is a kind of product."""

SYLLABLES = (
    _words("Bel, Cor, Dra, Fen, Gal, Hol, Jun, Kel, Lum, Mar, Nor, Pel, Quin, Ros, Tam, Vel, Zor"),
    _words("a, e, i, o, u, am, en, ir, ol, ur"),
    _words("dane, fex, gio, kra, lith, mont, nique, pora, rax, sora, tella, vane, wick, zeo"),
)
"""Brands are one of each."""

SERIES = _words(
    "Aster, Brook, Cinder, Dune, Ember, Fjord, Grove, Harbor, Indigo, Juniper, Kestrel, Lagoon, "
    "Meadow, Nimbus, Orchard, Prairie, Quartz, Ridge, Summit, Tundra, Willow, Zephyr"
)
"""Names of the families of a brand."""

TRAIT_LINES = (
    "{0}: we check every batch before it leaves the workshop.",
    "{0}, as our customers asked for in their reviews.",
    "Made to be {1} from the first day on.",
)
PART_LINES = (
    "Comes with {1}, which our designers chose over cheaper ideas.",
    "{0} is what sets this version apart.",
    "Look closer: {1} in every piece we sell.",
)
USE_LINES = (
    "A good choice for {1}.",
    "{0}: this is where it is at its best.",
    "Many buyers order it again for {1}.",
)
PLAIN_LINES = (
    "If something is wrong, write to us and we answer within a day.",
    "The box holds the product and a short guide in four languages.",
    "Please compare the picture with your screen set to normal brightness.",
    "Designed by a family business and shipped from our own warehouse.",
    "Returns are accepted for thirty days after delivery.",
)
"""Bullets; ``{0}`` is the attribute with a capital letter, ``{1}`` as it is."""
