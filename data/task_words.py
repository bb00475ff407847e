"""The words and sentence forms that data/tasks.py builds its rows from; "unseen" ones are nowhere in training.

Slots of a form: {name}, {address}, {when} ("Friday at 3 pm"), {on} ("on Friday at 3 pm", "tomorrow"), {items} ("two
oak stools"), and {On} and {Items} for the start of a sentence.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


FORMS = {
    "train": (
        "Hi, this is {name}. Please send {items} to {address} {on}.",
        "{name} here. I'd like {items}, delivered to {address}.",
        "Please deliver {items} to {name}, {address}, {on}.",
        "Order from {name}: {items}, {address}, {when}.",
        "Can I get {items}? Ship to {address}. My name is {name}.",
        "We need {items} at {address} {on}. {name}",
        "Hello! {Items} for {name}, please. Drop off at {address}.",
        "I am {name} and I want {items}. I live at {address}.",
        "{Items} to {address}, {when}. Thanks, {name}",
        "Send {items} to {address}. It's for {name}.",
        "Could you bring {items} {on}? I'm at {address}. {name}",
        "I'd like to buy {items}, for {when}. Regards, {name}",
        "This is {name}, {address}. Do you have {items}?",
        "My order: {items}. Address: {address}. Name: {name}.",
        "For {when}: {items}, to {address}. Ask for {name}.",
        "{name} wants {items} {on}.",
        "Please keep {items} for {name}. Pickup is {when}.",
        "It's {name} again: {items}, {address}, {when}.",
        "Is it possible to get {items} to {address} {on}? {name}",
        "{Items}, please. The name is {name}, we are at {address}.",
        "Hello, {items} please. {On} would be best. {name}",
        "Could you come {on}? We are out of stock and need {items}. {name}, {address}",
        "New order, {items}, customer {name}, {when}.",
        "Dear team, kindly send {items} to {address}. Best wishes, {name}",
        "{On} I need {items} at {address}. {name}",
        "Do you have {items} left? I'm {name}. I could come {on}.",
        "My name is {name}. {Items}, I'll collect them {on}.",
        "Bring {items} to {address} and ask for {name}.",
        "{name} called: {items}, {address}, needed {when}.",
        "I changed my mind: make it {items}, {when}. {name}",
        "Please get {items} to {address} {on}. {name}",
        "Thanks for the call. I'll take {items}. Deliver to {address}. {name}",
        "Would {when} work? I need {items}. {name}",
        "To: {address}. What: {items}. When: {when}. Who: {name}.",
        "A courier will fetch {items} {on} for {name}.",
        "{Items}, please! {name}, {address}.",
    ),
    "unseen": (
        "Good evening, {name} speaking. I want {items} brought to {address} {on}.",
        "Reserve {items} for me. I'll pass by {on}. Yours, {name}",
        "Quick one from {name}: {items}, drop at {address}.",
        "Our café at {address} needs {items} {on}. Contact: {name}.",
        "May I have {items} sent over? {On} is fine. Cheers, {name}",
        "I'm writing for {name}, who would love {items} {on}.",
        "Purchase: {items}. Destination: {address}. Date: {when}. Buyer: {name}.",
        "Hi there, can {items} reach {address} {on}? Book it under {name}.",
        "Could you drop {items} at {address}? {name} will pay.",
        "Looking for {items}. Call me {on}. {name}",
        "{On}, please have {items} ready. Signed, {name}",
        "We just moved to {address}, so {items} should go there {on}. {name}",
    ),
}

TITLES = _words("Mr, Mrs, Ms, Dr, Miss")
LAST_NAMES = {
    "train": _words(
        """Abbott, Acosta, Aguilar, Allen, Almeida, Alvarez, Anand, Andersen, Arnold, Arslan, Ashworth, Atkins, Ayala,
        Bailey, Baker, Bakker, Banerjee, Barker, Barnes, Barros, Becker, Bell, Bennett, Berger, Bergström,
        Bhatt, Bianchi, Bishop, Blake, Blanc, Boateng, Bond, Booth, Bosch, Boyle, Bradley, Brooks, Brown,
        Bruun, Bryant, Burke, Butler, Cabrera, Campbell, Carter, Caruso, Castro, Chambers, Chan, Chen,
        Chopra, Christensen, Clarke, Cohen, Cole, Collins, Conti, Cook, Cooper, Costa, Cox, Crawford, Cruz,
        Cunningham, Dahl, Daniels, Das, Dawson, Dean, Delgado, Demir, Diallo, Dietrich, Dixon, Dominguez,
        Doyle, Drake, Duarte, Dubois, Dunn, Díaz, Edwards, Eklund, Elliott, Ellis, Engel, Evans, Eze,
        Farouk, Fernández, Ferrari, Ferreira, Fischer, Fleming, Fletcher, Fontaine, Ford, Forsberg, Foster,
        Fowler, Franco, Fraser, Freeman, Friedman, Fuchs, Fuentes, Galli, García, Gardner, Gibson, Gill,
        Girard, Gomez, Gonçalves, Graham, Grant, Greco, Greene, Griffin, Guerrero, Gupta, Haas, Haddad,
        Hall, Hamilton, Hansen, Harper, Harris, Hart, Hawkins, Hayes, Heller, Henderson, Hernández,
        Hoffmann, Holm, Holmes, Hopkins, Howell, Huber, Hughes, Hunt, Hussain, Ito, Ivanova, Iyer, Jackson,
        Jacobs, Jansen, Jensen, Jiménez, Johansson, Johnston, Jones, Jordan, Joshi, Kaiser, Kaur, Kaya,
        Keller, Kelly, Kennedy, Kessler, Khan, Kim, Klein, Knight, Koch, Kovač, Kowalski, Krause, Kruger,
        Kumar, Lambert, Larsen, Laurent, Lawson, Lee, Lehmann, Leroy, Lim, Lindgren, Lloyd, Long, Lopes,
        López, Marino, Marshall, Martin, Mason, Mazur, Mbeki, Mehta, Meier, Mendes, Mensah, Mercier, Miller,
        Mitchell, Molina, Monroe, Morales, Moreau, Morgan, Murphy, Mwangi, Müller, Nair, Nakamura, Navarro,
        Nelson, Newman, Nguema, Nilsson, Nkosi, Nolan, Novak, Nowak, Núñez, O'Brien, O'Connor, Ochoa,
        Okafor, Oliveira, Olsen, Ortega, Owusu, Page, Papadakis, Parker, Patel, Pavlov, Pearson, Perez,
        Peters, Petrov, Pham, Phillips, Pinto, Poole, Popescu, Porter, Powell, Price, Quinn, Ramos, Reed,
        Reid, Reyes, Ricci, Richter, Rivera, Roberts, Robinson, Romano, Rosen, Rossi, Roy, Russell, Salazar,
        Sanders, Santos, Sato, Schmidt, Schneider, Schwarz, Serrano, Sharma, Shaw, Silva, Sims, Singh,
        Sokolov, Soto, Souza, Spencer, Stein, Stone, Strauss, Sullivan, Suzuki, Svensson, Tan, Tanaka,
        Taylor, Torres, Tran, Tucker, Turner, Varga, Vargas, Vega, Vidal, Vogel, Wagner, Walker, Wallace,
        Ward, Watson, Webb, Weber, White, Wilson, Wolf, Wong, Wood, Wright, Yamada, Yang, Young, Zhang,
        Zimmermann, Öztürk"""
    ),
    "unseen": _words(
        """Whitfield, Lefèvre, Adeyemi, Horváth, Castellano, Bauer, Sandoval, Eriksen, Thackeray, Yılmaz, Delacroix,
        Pereira, Kobayashi, Strand, Gallagher, Zieliński, Osborne, Ramírez, Lindholm, Petit"""
    ),
}
WHOLE_NAMES = {
    "train": _words(
        """Nguyễn Thị Lan, Trần Văn Minh, Lê Hoàng Nam, Phạm Thu Hà, Võ Minh Tuấn, Đặng Ngọc Mai, Bùi Thanh Sơn,
        Hồ Bảo Trân, Ngô Đức Anh, Dương Mỹ Linh, Trịnh Quang Huy, Mai Phương Thảo, Chloé Dubois, José García,
        Søren Nilsson, Zoë Fontaine, Emeka Okafor, Elif Demir, Håkon Larsen, Anna Kowalski"""
    ),
    "unseen": _words(
        """Huỳnh Quốc Việt, Đỗ Khánh Vy, Phan Gia Hân, Vũ Tường Vi, Aurélie Petit, Joaquín Sandoval, Björn Eriksen,
        Priya Adeyemi, Owen Whitfield, Naomi Strand"""
    ),
}
KINDS = _words(
    """red, blue, green, white, black, yellow, brown, grey, orange, purple, pink, golden, silver, large, small, big,
    tall, short, wide, heavy, light, round, square, wooden, metal, plastic, new"""
)
THINGS = {
    "train": _words(
        """alarm, anchor, apron, armchair, ashtray, axe, backpack, badge, bag, banner, barrel, basin, basket, bath mat,
        bathtub, beaker, bed, bell, belt, bench, bib, bicycle, binder, blanket, blender, blind, board, bolt,
        book, bookcase, boot, bottle, bowl, box, bracelet, bracket, broom, brush, buckle, bulb, button,
        cabinet, cable, cage, cake tin, calendar, camera, candle, canoe, card, carpet, cart, chain, chair,
        chest, chopping board, clamp, clock, coaster, coat, comb, compass, computer, cooker, cooler, cork,
        cot, counter, crate, crayon, cup, curtain, cushion, desk, dish, door, doormat, dresser, drill, drum,
        dustpan, duvet, earring, easel, envelope, eraser, fan, faucet, fence, figurine, file, filter, flag,
        flask, folder, fork, frame, freezer, fridge, funnel, garland, gate, globe, glove, grill, guitar,
        hairbrush, hammer, handbag, handle, hanger, hat, headboard, heater, helmet, hinge, hook, hose, iron,
        jacket, jar, jug, kennel, keyboard, keyring, knife rack, label, ladle, lamp, laptop, lid, lighter,
        lock, locker, magnet, mallet, map, marker, mask, mattress, medal, microscope, mirror, monitor, mug,
        napkin, necklace, needle, oar, ornament, oven, oven glove, paddle, paintbrush, pan, parasol, peg,
        pen, pencil, piano, picture, pillow, pipe, pitcher, plank, plate, plug, pocket knife, poster, pot,
        pouch, printer, projector, puppet, purse, puzzle, quilt, rack, radio, rake, razor, ring, robe, rope,
        rug, ruler, sack, saddle, sandal, saw, scale, screen, screw, seat, sensor, shawl, shelf, shirt, shoe
        box, shovel, shutter, sign, sink, skirt, sled, sock, sofa, spade, speaker, sponge, spoon, stamp,
        stand, stapler, step, stool, stove, strainer, suitcase, sweater, switch, table, tablecloth, tap,
        tarp, teapot, tent, thermos, ticket, tie, tile, timer, toaster, tool, toolbox, torch, towel, tray,
        tripod, trolley, trowel, tub, tube, umbrella, valve, vase, violin, wallet, watch, wheel, whistle,
        window, wire, workbench, wreath, zip"""
    ),
    "unseen": _words(
        """kettle, ladder, drawer, hammock, saucer, bucket, wardrobe, notebook, lantern, planter, kite, thermometer,
        trumpet, scooter"""
    ),
}
STREETS = {
    "train": _words(
        """Abbot, Acorn, Albert, Alder, Anchor, Apple, Arch, Ash, Aspen, Avon, Baker, Bank, Barn, Bay, Beach, Beech,
        Birch, Bishop, Bridge, Broad, Brook, Canal, Castle, Cedar, Chapel, Cherry, Chestnut, Church,
        Clifton, Coach, College, Copper, Cottage, Cross, Crown, Dale, Dean, Dock, Duke, Elm, Falcon, Farm,
        Fern, Ferry, Field, Fir, Flora, Forest, Fountain, Fox, Garden, George, Glen, Grange, Green, Grove,
        Hall, Harbour, Hawthorn, Hazel, Heath, High, Hill, Holly, Hope, Ivy, Jubilee, Juniper, King, Lake,
        Lark, Laurel, Lemon, Library, Lime, Linden, London, Lower, Main, Manor, Maple, Market, Marsh,
        Meadow, Mill, Moor, Mountain, New, North, Oak, Old, Orange, Orchard, Palace, Park, Pear, Peach,
        Pine, Poplar, Priory, Prince, Quarry, Queen, Railway, Richmond, Ridge, River, Robin, Rose,
        Salisbury, School, Shore, Silver, South, Spring, Spruce, Stable, Station, Summer, Sun, Swan, Temple,
        Tower, Union, Upper, Valley, Victoria, Vine, Walnut, Water, Wells, West, Wheat, Wind, Windsor, Wood,
        York"""
    ),
    "unseen": _words(
        "Willow, Abbey, Ocean, Museum, Thistle, Bamboo, Lighthouse, Theatre, Pebble, Cambridge, Sycamore, Harvest"
    ),
}
STREET_KINDS = _words("Street, Road, Lane, Avenue, Close, Way, Drive, Court, Place, Row")
WHOLE_STREETS = {
    "train": _words(
        """Rue Molière, Rue du Marché, Via Roma, Via Garibaldi, Calle Mayor, Calle Cervantes, Königstraße, Gartenweg,
        Rua Augusta, Avenida São João, Phố Huế, Đường Lê Lợi, Kungsgatan, Plac Zamkowy, Nørregade, İstiklal
        Caddesi"""
    ),
    "unseen": _words("Rue Voltaire, Via Dante, Calle del Sol, Bahnhofstraße, Phố Trần Phú, Rua das Flores"),
}
MONTHS = {
    "train": _words("January, March, April, May, June, July, September, October, November, December"),
    "unseen": _words("February, August"),
}
WEEKDAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
NUMBER_WORDS = dict(zip(_words("two, three, four, five, six, seven, eight, nine, ten"), range(2, 11), strict=True)) | {
    "twelve": 12
}
