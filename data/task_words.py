"""The words and sentence forms that data/tasks.py builds its rows from; "unseen" ones are nowhere in training.

Slots of a form: {name}, {place}, {time}, {day} (the day alone), {on} ("on Friday", "tomorrow"), {items} (a quantity and
a thing), {On} and {Items} (the same at the start of a sentence), {some} ("some oak stools"), {bare} ("oak stools").
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(" ".join(word.split()) for word in text.split(","))


FORMS = {
    "train": (
        "Hi, this is {name}. Could you send {items} to {place} {on} at {time}?",
        "{name} here. I'd like {items} delivered to {place} by {day}, please.",
        "Please deliver {items} to {name} in {place} {on} at {time}.",
        "Order from {name}: {items}. Deliver to {place} {on}.",
        "Can I get {items}? Ship to {place}. My name is {name}.",
        "We need {items} in {place} {on}, before {time}.",
        "Hello! {Items} for {name}, please. Drop off in {place} at {time} {on}.",
        "Good morning, I am {name} and I want to order {items}. I live in {place}.",
        "{Items} to {place}, {day}, {time}. Thanks, {name}",
        "Send {items} to {place}. It's for {name}.",
        "Could you bring {items} to my shop in {place} at {time}? I'm there {on}. {name}",
        "I'd like to buy {items}. Delivery {on}, please. Regards, {name}",
        "This is {name} from {place}. Do you have {items} for {day}?",
        "My order: {items}. Address: {place}. Time: {time}. Name: {name}.",
        "For {day}: {items}, to {place}. Ask for {name}.",
        "{name} wants {items}, delivered to {place} at {time}.",
        "Please put {items} aside for {name}. I'll pick up {on} at {time}.",
        "Hey, it's {name} again. Same as last time: {items}, {place}, {day}.",
        "Is it possible to get {items} to {place} by {time} {on}?",
        "I would like {items}. The name is {name} and we are in {place}. Can you come {on}?",
        "Hello, {items} please. {On} at {time} would be best. {name}, {place}",
        "We are in {place} and we ran out of {bare}. Could you come {on}? {name}",
        "New order, {items}, customer {name}, delivery to {place}, {day} at {time}.",
        "Dear team, kindly send {items} to our office in {place}. Best wishes, {name}",
        "{On} I need {items} in {place}. Please call when you leave. {name}",
        "Do you still sell {bare}? I'm {name}, from {place}. I could come {on} at {time}.",
        "Hi! My name is {name}. {Items} please, I'll collect them {on}.",
        "Bring {items} to {place} at {time}, and tell {name} when you are there.",
        "{name} called. {Items} for {place}, needed by {day}.",
        "I ordered {items} but changed my mind about the day: make it {day}, {time}. {name}",
        "Please send {some} to {place} {on}. Thank you! {name}",
        "Thanks for the call. I'll take {items}. Deliver at {time} to {place}. {name}",
        "Would {day} at {time} work? I need {items} in {place}.",
        "To: {place}. What: {items}. When: {day}. Who: {name}.",
        "It's {name}. A courier will fetch {items} {on} at {time}.",
        "{Items}, please! {name}, {place}. No rush.",
    ),
    "unseen": (
        "Good evening, {name} speaking. I want {items} brought to {place} {on}, around {time}.",
        "Reserve {items} for me, please. I'll be in {place} {on}. Yours, {name}",
        "Quick one from {name}: {items}, drop at {place}, {time}.",
        "Our café in {place} needs {items} {on}. Contact: {name}.",
        "May I have {items} sent over to {place}? {On} is fine. Cheers, {name}",
        "I'm writing for {name}, who would love {items}. Deliver {on} at {time}, please.",
        "Purchase request: {items}. Destination: {place}. Date: {day}. Hour: {time}. Buyer: {name}.",
        "Hi there, can {items} reach {place} by {day}? If so, book it under {name}.",
        "{name} would like to know if you could drop {items} at {place} at {time}.",
        "Looking for {some} near {place}. Could someone call me {on}? {name}",
        "At {time} {on}, please have {items} ready. Signed, {name}",
        "We just moved to {place}, so send {items} there {on}, not to the old flat. {name}",
    ),
}

FIRST_NAMES = {
    "train": _words(
        """Aaron, Abena, Abigail, Adam, Adriana, Adèle, Agnes, Ahmed, Aisha, Alan, Albert, Alejandro, Alex, Alice,
        Alma, Amelia, Amir, Ana, Anders, André, Angela, Anita, Anjali, Anna, Annika, Antonio, Ariel, Arjun,
        Arthur, Astrid, Aurora, Axel, Ayşe, Barbara, Basil, Beatriz, Ben, Benedict, Bernard, Bianca, Birgit,
        Bogdan, Bonnie, Boris, Brenda, Brian, Bruno, Camille, Carlos, Carmen, Caroline, Caspar, Catherine,
        Cecilia, Céline, Chandra, Charles, Charlotte, Chloé, Christian, Christine, Clara, Claude, Colin,
        Conor, Cynthia, Cyrus, Dalia, Damian, Daniel, Daria, David, Deborah, Deepak, Denis, Derek, Diana,
        Dimitri, Dominic, Donna, Doris, Dylan, Dörte, Edith, Eduardo, Eleanor, Elena, Elias, Elif,
        Elizabeth, Ellen, Elsa, Emeka, Émile, Emma, Enrique, Erik, Ernest, Esther, Eugene, Eva, Faith,
        Farid, Fatima, Felix, Fernando, Filip, Frances, Frank, François, Frida, Fritz, Gabriel, Gemma,
        George, Gerald, Gilbert, Gita, Giulia, Gloria, Gordon, Grace, Greta, Guillaume, Gustav, Hana,
        Hannah, Harold, Harriet, Heidi, Helga, Hélène, Henry, Herbert, Hiro, Holly, Howard, Hugo, Håkon,
        Ian, Ibrahim, Ida, Ilse, Imran, Ines, Inga, Irina, Iris, Isabel, Ivan, Jack, Jacob, James, Jamila,
        Jan, Jane, Jasmine, Javier, Jean, Jeremy, Joan, Joel, John, Jonas, Joyce, Juan, Judith, Julia,
        Julian, Kamal, Karen, Karim, Kate, Katya, Keith, Kenji, Kevin, Klaus, Kofi, Kristina, Kyle, Laila,
        Lars, Laura, Lena, Leon, Lewis, Liam, Lilian, Linda, Lorenzo, Luca, Lucas, Lucy, Luis, Lydia, Mads,
        Magda, Maja, Malik, Manuel, Marco, Margaret, Maria, Martha, Mateo, Maxim, Megan, Mehmet, Melissa,
        Mia, Miguel, Mina, Mohammed, Monika, Mário, Nadia, Nancy, Natalia, Neil, Nicole, Nikhil, Nils, Noah,
        Noémie, Nora, Norman, Olga, Oliver, Olivia, Omar, Oscar, Otto, Pablo, Pamela, Patrick, Paula, Pedro,
        Peter, Petra, Philip, Pooja, Quentin, Rachel, Rahul, Ramón, Rania, Raymond, Rebecca, Regina, Renée,
        Ricardo, Richard, Robert, Roger, Roland, Roman, Rosa, Rupert, Ruth, Ryan, Sabine, Salma, Samir,
        Samuel, Sandra, Sara, Scott, Sean, Sharon, Sheila, Sigrid, Silvia, Simon, Sofía, Sophie, Stella,
        Sunita, Susan, Sven, Sylvie, Søren, Tanja, Tara, Teresa, Théo, Thomas, Timothy, Tina, Tomás, Tony,
        Ulrich, Umar, Ursula, Valerie, Vanessa, Vera, Veronica, Victor, Vikram, Vincent, Vivian, Walter,
        Wanda, Wendy, William, Xavier, Yara, Yasmin, Yolanda, Yusuf, Yvonne, Zainab, Zara, Zoë"""
    ),
    "unseen": _words(
        """Mathilde, Rafael, Ingrid, Kwame, Léa, Stefan, Priya, Owen, Björn, Valentina, Hassan, Aurélie, Tobias, Naomi,
        Gábor, Fiona, Marcus, Leila, Joaquín, Bridget"""
    ),
}
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
        """Nguyễn Thị Lan, Trần Văn Minh, Lê Hoàng Nam, Phạm Thu Hà, Võ Minh Tuấn, Đặng Ngọc Mai, Bùi Thanh Sơn, Hồ Bảo
        Trân, Ngô Đức Anh, Dương Mỹ Linh, Trịnh Quang Huy, Mai Phương Thảo, Đinh Công Thành, Tạ Kim Oanh,
        Cao Xuân Bách, Lâm Tuyết Nhi, Tô Hải Đăng, Châu Bích Ngọc"""
    ),
    "unseen": _words("Huỳnh Quốc Việt, Đỗ Khánh Vy, Lý Gia Hân, Phan Hữu Phước, Vũ Tường Vi"),
}
KINDS = _words(
    """aluminium, antique, bamboo, beige, big, black, blue, brass, bright, bronze, brown, canvas, cardboard, ceramic,
    cheap, cherry, clay, copper, cotton, crystal, dark, denim, electric, enamel, felt, flat, foam, folding,
    glass, gold, golden, granite, green, grey, heavy, indigo, iron, ivory, jute, large, leather, light, lilac,
    linen, long, maple, marble, metal, mini, narrow, oak, olive, orange, oval, padded, paper, pearl, pine, pink,
    plain, plastic, porcelain, purple, quilted, red, resin, round, rubber, rustic, satin, scented, short, silk,
    silver, slate, slim, small, soft, spruce, square, steel, stone, striped, tall, teak, thick, thin, tin,
    turquoise, velvet, violet, walnut, waxed, white, wide, wooden, wool, woven, yellow, zinc"""
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
        "kettle, ladder, drawer, hammock, saucer, bucket, wardrobe, notebook, lantern, planter, kite, thermometer"
    ),
}
PLACES = {
    "train": _words(
        """Aberdeen, Accra, Adelaide, Algiers, Almaty, Amman, Amsterdam, Ankara, Antwerp, Arles, Arusha, Asunción,
        Athens, Auckland, Austin, Avignon, Baku, Bandung, Bangkok, Barcelona, Basel, Bath, Beirut, Belém,
        Belfast, Belgrade, Bergen, Berlin, Biarritz, Bilbao, Bogotá, Bonn, Bordeaux, Boston, Brighton,
        Brisbane, Brno, Bruges, Brussels, Bucharest, Budapest, Buenos Aires, Cairo, Calgary, Cambridge,
        Cancún, Canterbury, Cape Town, Caracas, Cardiff, Casablanca, Chennai, Chicago, Cleveland, Cologne,
        Colombo, Copenhagen, Cork, Cuenca, Cusco, Cádiz, Córdoba, Dakar, Dallas, Delft, Delhi, Derby,
        Detroit, Dijon, Doha, Dortmund, Dresden, Dubai, Dublin, Dundee, Durban, Edinburgh, Essen, Exeter,
        Fez, Florence, Frankfurt, Freiburg, Galway, Gdańsk, Geneva, Genoa, Ghent, Glasgow, Granada,
        Guadalajara, Göteborg, Haarlem, Halifax, Hamburg, Hanoi, Havana, Helsinki, Hobart, Houston, Hull,
        Huế, Innsbruck, Inverness, Istanbul, Izmir, Jakarta, Jena, Kampala, Kansas City, Kathmandu, Kiel,
        Kigali, Kobe, Kraków, Kyoto, Köln, La Paz, Lagos, Lausanne, Le Havre, Leeds, Leiden, Leipzig, León,
        Lille, Lima, Limerick, Linz, Lisbon, Liverpool, London, Lucerne, Lund, Luxembourg, Lyon, Maastricht,
        Madrid, Malmö, Manila, Maputo, Marseille, Medellín, Melbourne, Memphis, Mérida, Metz, Miami, Milan,
        Minsk, Monaco, Montevideo, Munich, Málaga, Nairobi, Nantes, Naples, Nashville, New York, Newcastle,
        Nice, Norwich, Nottingham, Nuremberg, Odense, Oporto, Orlando, Osaka, Oslo, Ottawa, Oxford, Padua,
        Palermo, Panama City, Paris, Perth, Pisa, Plymouth, Portland, Porto Alegre, Poznań, Prague, Preston,
        Quito, Rabat, Ravenna, Recife, Reims, Rennes, Reykjavík, Riga, Rome, Rotterdam, Rouen, Salzburg, San
        José, Santiago, São Paulo, Sapporo, Sarajevo, Savannah, Seattle, Seoul, Sheffield, Siena, Singapore,
        Skopje, Sofia, Split, Stavanger, Stockholm, Strasbourg, Stuttgart, Swansea, Sydney, Szeged, Tallinn,
        Tampa, Tampere, Tbilisi, Tirana, Toledo, Toronto, Tours, Trieste, Trondheim, Tucson, Tunis, Turin,
        Uppsala, Utrecht, Valencia, Vancouver, Venice, Verona, Vienna, Vigo, Vũng Tàu, Warsaw, Wellington,
        Winnipeg, Worcester, York, Zagreb, Zürich, Đà Nẵng, 11 Market Place, 12 Rose Street, 15 Meadow
        Court, 140 Lake Drive, 48 Station Road, 68 Forest Road, 77 Queens Road, 160 Park Avenue, 214 High
        Street, 25 Garden Row, 29 School Lane, 3 Harbour View, 31 North Parade, 36 Elm Grove, 402 Bridge
        Street, 5 Church Hill, 502 Hill Street, 58 River Walk, 6 Victoria Square, 7 Mill Lane, 83 Orchard
        Way, 9 Chapel Lane, 91 King Street"""
    ),
    "unseen": _words(
        """Bristol, Vilnius, Cần Thơ, Montréal, Denver, Aarhus, Sevilla, Mombasa, Graz, Plovdiv, Nha Trang, Toulouse,
        64 Willow Close, 19 Castle Road, 230 Ocean Drive, 8 Abbey Gardens, Phoenix, Bologna"""
    ),
}
MONTHS = {
    "train": _words("January, March, April, May, June, July, September, October, November, December"),
    "unseen": _words("February, August"),
}
WEEKDAYS = _words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
NUMBER_WORDS = dict(zip(_words("two, three, four, five, six, seven, eight, nine, ten"), range(2, 11), strict=True)) | {
    "twelve": 12
}
