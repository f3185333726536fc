"""Vocabulary of `instruct_data.py`: words, capitals, questions and answers."""

HELLO = "Hello!"
ELSE = "I am a tiny model: I can add, spell, reverse, count and name capitals."
UNKNOWN_CAPITAL = "I do not know that capital."

WORDS = str.split("""
able acorn actor apple april arrow autumn baker banana basket beach bell berry bird blue boat bone
book bottle bread bridge bright bring brother brown brush butter button cabin cake camel candle
carpet carrot castle cat cave chair chalk cheese cherry chicken child circle city clock cloud coat
coffee cold color corn cotton cow crab cream cup dance dark day deer desk diamond dinner doctor dog
door dragon dream dress drum duck dust eagle ear early earth egg eight empty engine evening family
farm father feather field finger fire fish flag floor flower fly forest fork fox friend frog fruit
game garden ghost giant glass glove goat gold good goose grape grass gray green guitar hammer hand
happy harbor hat heart hello hill honey horse hotel house hungry ice ink iron island jacket jam
jelly jewel juice jungle key king kitchen kite kitten knee knife lake lamp leaf lemon letter
light lily lion lizard magic maple market meadow milk mirror money monkey moon morning mother
mouse music nail needle nest night noodle north nose number ocean olive onion orange otter
oven owl paint panda paper parrot peach pear pencil penguin people pepper piano picture pig pillow
pilot pizza planet plate plum pocket poem pony potato prince purple puzzle queen quiet rabbit rain
red ribbon rice ring river road robin rock roof rose salad salt sand school sea seven shadow shark
sheep ship shirt shoe silver sister sky sleep small smoke snail snake snow soap sock soup spider
spoon spring square star stone storm story street sugar summer sun sweet table tea teacher ticket
tiger time toast tomato tower town train tree tulip turtle uncle under valley village violin voice
wagon walnut water weather whale wheat wheel white wind window winter wolf wood world yellow young
zebra zero
""")

CAPITALS = dict(
    pair.split(":")
    for pair in """
Argentina:Buenos Aires,Australia:Canberra,Austria:Vienna,Belgium:Brussels,Brazil:Brasilia,
Bulgaria:Sofia,Canada:Ottawa,Chile:Santiago,China:Beijing,Colombia:Bogota,Croatia:Zagreb,
Cuba:Havana,Denmark:Copenhagen,Egypt:Cairo,England:London,Finland:Helsinki,France:Paris,
Germany:Berlin,Ghana:Accra,Greece:Athens,Hungary:Budapest,Iceland:Reykjavik,India:New Delhi,
Iran:Tehran,Iraq:Baghdad,Ireland:Dublin,Italy:Rome,Japan:Tokyo,Kenya:Nairobi,Mexico:Mexico City,
Morocco:Rabat,Nepal:Kathmandu,Norway:Oslo,Peru:Lima,Poland:Warsaw,Portugal:Lisbon,
Romania:Bucharest,Russia:Moscow,Scotland:Edinburgh,Serbia:Belgrade,Spain:Madrid,Sweden:Stockholm,
Thailand:Bangkok,Turkey:Ankara,Ukraine:Kyiv,Vietnam:Hanoi
""".replace("\n", "").split(",")
)

PHRASES = {
    "add": """What is {a} + {b}?|What's {a} + {b}?|{a} + {b}|{a} + {b} =|{a}+{b}|{a}+{b}=|
        What is {a}+{b}?|Add {a} and {b}.|Add {a} to {b}.|What is {a} plus {b}?|{a} plus {b}|
        How much is {a} + {b}?|How much is {a} plus {b}?|Compute {a} + {b}.|
        What is the sum of {a} and {b}?|Tell me {a} + {b}.""",
    "spell": """Spell {w}.|Spell the word {w}.|How do you spell {w}?|How is {w} spelled?|
        Please spell {w}.|Can you spell {w}?|Spell out {w}.|Spell it out: {w}|
        What are the letters of {w}?|Spell: {w}""",
    "reverse": """Reverse {w}.|Reverse the word {w}.|Please reverse {w}.|Can you reverse {w}?|
        Write {w} backwards.|What is {w} backwards?|{w} backwards|Say {w} backwards.|Reverse: {w}|
        Turn {w} around.|What is {w} reversed?""",
    "letters": """How many letters are in {w}?|How many letters are there in {w}?|
        How many letters does {w} have?|How many letters has {w}?|Count the letters of {w}.|
        Count the letters in {w}.|How many letters in {w}?|How long is {w}?|
        How long is the word {w}?|Letters in {w}?""",
    "count": """Count to {n}.|Count up to {n}.|Count from 1 to {n}.|Please count to {n}.|
        Can you count to {n}?|Count: 1 to {n}|Count for me, up to {n}.|Numbers up to {n}|
        List the numbers from 1 to {n}.|Say the numbers up to {n}.|Write the numbers 1 to {n}.|
        Give me the numbers up to {n}.|What are the numbers from 1 to {n}?|Could you count to {n}?|
        Count the numbers up to {n}.|Count to the number {n}.|Can you count from 1 to {n}?|
        Please count up to {n}.|Count up to the number {n}.|Count to {n}, please.""",
    "capital": """What is the capital of {c}?|What's the capital of {c}?|Capital of {c}?|
        The capital of {c}?|Name the capital of {c}.|Tell me the capital of {c}.|
        Which city is the capital of {c}?|What city is the capital of {c}?|
        {c}'s capital|What is {c}'s capital?|Please name the capital of {c}.|
        Do you know the capital of {c}?|The capital of {c} is|Say the capital of {c}.""",
}
"""Questions of each skill, separated by `|`."""

HELD_OUT_PHRASES = {
    "count": "Could you count up to {n}?|Please count from 1 to {n}.|Can you count up to {n}?",
    "capital": """Can you tell me the capital of {c}?|What is the name of the capital of {c}?|
        Which is the capital of {c}?|I want to know the capital of {c}.""",
}

FOLLOW_UPS = {
    "spell": """Spell it.|And how is it spelled?|Now spell it.|Spell that.|And spell it.|
        Now spelled?""",
    "reverse": """And backwards?|Now backwards.|Reverse it.|Now reverse it.|Backwards?|
        And now backwards.|And reversed?|Write it backwards.|Now write it backwards.""",
    "letters": """How many letters is that?|How many letters does it have?|Count its letters.|
        How long is it?|And how many letters?|How many letters?""",
    "add": """Add {n} to that.|Add {n}.|Plus {n}?|And {n} more?|Now add {n}.|And plus {n}?|
        Add {n} more.""",
    "capital": "And of {c}?|And {c}?|What about {c}?|And the capital of {c}?|And that of {c}?|{c}?",
    "word": "And {w}?|What about {w}?|Now {w}.|And the word {w}?",
}
"""Questions that refer to the turn before."""

SHOUT = [
    "Answer in capitals.",
    "Use capital letters.",
    "Answer in upper case.",
    "Write in capitals.",
]
"""System messages."""

CHATTER = {
    HELLO: """Hello|Hello!|Hi|Hi!|Hey|Hey!|Hi there|Hello there!|Good morning|Good morning!|
        Good evening.|Good day!|Greetings|Good morning, model.|Good evening to you.|Hey model|
        Hi you|Hello, how are you?|Hi, how are you?|Hello model|
        Hey there""",
    ELSE: """What can you do?|What can you do|Help|Help!|What do you know?|Who are you?|
        What are you?|
        Tell me about yourself.|What is your name?|What are your skills?|How can you help me?|
        Can you help me?|What should I ask?|What can I ask you?|Introduce yourself.|
        What are you able to do?|Are you a model?|Are you human?|Which tasks can you do?|
        Tell me a story.|Tell me a joke.|Why is the sky blue?|How old are you?|Where do you live?|
        What time is it?|What day is it today?|How is the weather?|Will it rain tomorrow?|
        Sing a song.|Do you like music?|Who wrote Hamlet?|Who is the president?|What is love?|
        What is the meaning of life?|How do I cook rice?|How far away is the moon?|
        Translate this to French.|Write an email to my boss.|Write a program.|Play a game with me.|
        I am sad.|I am bored.|I love you.|You are wrong.|Why?|What?|How?|Really?|Is that true?|
        Can you drive a car?|Can you dance?|Do you dream?|Explain gravity.|
        What is the time in Rome?|
        Who won the game?|Where is my key?|When was the war?|How big is the sun?|Give me advice.|
        What should I eat?|Make me a sandwich.|Where is the station?|Do you speak German?|
        Which animal is the fastest?|What color is grass?|Open the door.|Buy milk.|The cat sleeps.|
        I like tea.|It is late.|This is a test.|We went home.|Are you sure?|I do not know.|asdf|
        What is {a} - {b}?|{a} - {b}|What is {a} times {b}?|{a} * {b}|Divide {a} by {b}.|
        Is {a} a prime number?|What is a {w}?|What is {w}?|Tell me about the {w}.|{w}|The {w}.|
        Write a poem about a {w}.|Where is the {w}?|Do you like the {w}?|Draw a {w}.|
        What does {w} mean?|Who is {c}?|Where is {c}?|How many people live in {c}?|{c}|
        Tell me about {c}.|Which language do they speak in {c}?|Is {c} a big country?|I see a {w}.|
        Translate {w}.|What rhymes with {w}?|Why is the {w} here?|Sell me a {w}.|
        I have {a} of them.|
        {a} / {b}|What is {a} / {b}?|What is {a} * {b}?|Write a story about the {w}.|
        Write a letter.|
        Tell me a tale about {c}.|Sing about the {w}.|How old is {c}?|What is the {w} for?|
        Who made it?|
        Where does he live?|I am tired.|I am cold.|How do I make tea?|What is the best game?|
        Let us go.|
        Do you like me?|Why are you here?|How small are you?|What is a {w} doing here?|
        Who has the {w}?|My {w} is red.|How do I get to {c}?|When is {w}?|Can I eat a {w}?""",
    "You are welcome.": """Thanks|Thanks!|Thank you|Thank you!|Thank you very much.|Many thanks!|
        Thanks a lot|Great, thanks!|Thank you so much.|Thanks so much!|Thanks, that is nice.|
        Good, thanks.|Thank you, that is all.|Thank you, model.|Nice, thank you!|Well done!|
        Good.|Nice!|Very good.|Great!|Cool""",
    "Goodbye!": """Bye|Bye!|Goodbye|Goodbye!|See you|See you later!|Good night.|Bye bye|
        I must go.|Goodbye, model!|See you tomorrow.|Bye now.|See you again!""",
}
"""Answer to its questions."""

HELD_OUT_CHATTER = {
    HELLO: "Hello, model!|Hi, model!|Good morning to you|Hey, how are you?",
    ELSE: """What can you do for me?|Tell me what you can do.|What do you do?|Who made you?|
        What is the {w} doing?|Write a song about a {w}.|How old is the {w}?|Multiply {a} by {b}.|
        Tell me a story about {c}.|Where does the {w} live?|Why are you so small?|I am hungry.|
        How do I bake bread?|What is the best book?|Do you like {c}?|Let us talk about the {w}.""",
    "You are welcome.": "Thanks, model!|Thanks, that is good.|Great, thank you.",
    "Goodbye!": "Goodbye now.|Bye, see you!|Bye, model!",
}

OTHER_COUNTRIES = str.split("""
Angola Bolivia Cambodia Chad Cyprus Ecuador Estonia Fiji Gabon Guinea Haiti Honduras Jamaica Jordan
Laos Latvia Lebanon Libya Mali Malta Monaco Mongolia Namibia Niger Oman Panama Qatar Rwanda Samoa
Senegal Slovakia Somalia Sudan Syria Togo Tonga Tunisia Uganda Uruguay Yemen Zambia Zimbabwe
""")
"""Countries that are not in `CAPITALS`."""

FIRST = str.split(
    "b c d f g h j k l m n p r s t v w z bl br ch cl cr dr fl fr gl gr pl pr sh sl sn st th tr"
)
MIDDLE = str.split("a e i o u a e i o u ai ea ee oa oo ou")
LAST = ["", "", "", *str.split("b d f g k l ll m n p r s ss t ck ng nd nt rd rk st sh th x y")]
