"""The words of the speech world's sentences: plain English, and hardly two that sound alike.

An underscore joins words that stay together. Nouns stand as `singular` or `singular/plural`, verbs
as `base`, `base/past` or `base/past/present participle`; what isn't given follows the rules of
spelling in `grammar`.
"""

PEOPLE = """
    actor architect artist astronaut athlete author baker banker barber beggar boxer bride builder
    butcher butler captain carpenter cashier champion chemist child/children cleaner clerk climber
    clown coach colonel composer cook cousin cowboy critic customer dancer dentist designer
    detective director diver doctor driver drummer editor emperor engineer expert farmer father
    fisherman/fishermen florist friend gardener giant girl goalkeeper governor grandfather
    grandmother guard guest guide guitarist gymnast hairdresser hermit hero/heroes historian hunter
    inspector inventor jeweller journalist judge juggler juror king landlord lawyer leader lecturer
    librarian lifeguard locksmith magician manager mason mayor mechanic merchant messenger miller
    minister monk mother musician neighbour nephew niece novelist nurse officer operator optician
    orphan owner painter partner passenger patient pianist pilot pioneer pirate plumber poet
    policeman/policemen politician porter potter preacher president priest prince printer prisoner
    professor programmer publisher queen rebel referee reporter robber sailor scholar scientist
    sculptor secretary senator servant shepherd singer sister skater soldier student surgeon swimmer
    tailor teacher tenant thief/thieves tourist trader traveller tutor twin uncle veteran viking
    villager visitor volunteer waiter warrior watchman/watchmen widow winner witness wizard
    woman/women worker wrestler writer
"""

ANIMALS = """
    alligator antelope badger bat beaver bee beetle bison buffalo/buffaloes bull butterfly camel
    canary cat caterpillar cheetah chicken cobra cow coyote crab cricket crocodile crow deer/deer
    dolphin donkey dragonfly duck eagle eel elephant falcon ferret flamingo fox frog giraffe goat
    goldfish/goldfish gorilla grasshopper hamster hawk hedgehog hen heron hippo horse hyena jackal
    jaguar jellyfish/jellyfish kangaroo kitten koala ladybird lamb leopard lion lizard llama lobster
    lynx magpie mole monkey mosquito/mosquitoes moth mouse/mice mule octopus ostrich otter owl
    ox/oxen panda panther parrot peacock pelican penguin pheasant pig pigeon pony porcupine puppy
    rabbit raccoon rat raven reindeer/reindeer robin salmon/salmon scorpion seagull shark
    sheep/sheep snail snake sparrow spider squid squirrel stork swallow swan tiger toad tortoise
    turkey turtle vulture walrus wasp weasel wolf/wolves worm zebra
"""

THINGS = """
    accordion album alphabet ambulance anchor ankle anthem apple apron armchair arrow ashtray atlas
    axe backpack badge bag ball balloon banana bandage banjo banner barrel basin basket bathtub
    battery beacon bean bed bell belt bench bicycle bill blanket blender boat bolt bomb bone bonnet
    book boot bottle bowl box bracelet branch brick bridge broom brush bubble bucket bulb bullet bus
    button cabbage cabinet cable cactus/cacti cage cake calculator calendar camera candle candy
    cannon canoe canvas cape car caravan card carpet carrot cart carton cartoon casket cassette
    castle cellar chain chair chalk chandelier chapter cheese cherry chest chimney chisel chocolate
    cigar circle clarinet clock closet cloth cloud club coat coconut coin collar comb comet compass
    computer cookie cork corner costume couch counter cradle crane crate crayon crown crutch crystal
    cucumber cup cupboard curtain cushion cylinder dagger desk dial diamond diary dictionary diploma
    dish document doll dollar doorbell doughnut drawer drawing dress drill drum dungeon easel egg
    elbow elevator emerald engine envelope eraser essay eyebrow fabric fan feather fence ferry
    fiddle file filter finger fingerprint fireplace flag flame flask flute folder football forehead
    fork fossil fountain freezer fridge fruit funnel furnace gadget garment gear gem ghost gift
    glacier glass globe glove goblet grape gravestone guitar gun hammer hammock handbag handkerchief
    handle harbour harp harpoon hat headphone heart helicopter helmet herb hinge honeycomb hook hoop
    hose hourglass hydrant iceberg igloo ingot instrument invitation iron jacket javelin jeep jersey
    jewel jigsaw jug kettle keyboard kidney kite knapsack knife/knives knob label lace ladder ladle
    lamp lantern lasso laptop leaf/leaves leaflet lemon lens letter lever licence lid lighthouse
    lipstick liver lock locket log lollipop loom lung machine magazine magnet mandolin mango/mangoes
    map marble mask mat match mattress meadow melon menu microphone microscope microwave mirror
    missile mixer monument moon mop motor motorcycle mountain moustache mug mushroom napkin necklace
    needle nest net newspaper notebook novel nozzle nutshell olive omelette onion orange orchid
    organ ornament oven overcoat package paddle padlock painting palette pamphlet pan pancake
    parachute parasol parcel parsnip passport patch peach peanut pearl pebble pen pencil pendant
    pepper perfume phone photo photograph piano pickle picture pie pigment pill pillow pin pineapple
    pipe pistol pitcher pizza planet plank plant plaster plate platform plough plug plum pocket poem
    poncho pond poppy portrait poster pot potato/potatoes pouch present pretzel propeller pudding
    pulley pump pumpkin puppet purse puzzle pyramid quilt quiver racket radar radiator radio radish
    raft railing raincoat raisin rake ramp raspberry razor receipt record reed refrigerator ribbon
    riddle rifle ring robe robot rocket rod roof rope rose rucksack rudder rug ruler saddle sandal
    sandwich satellite saucepan saucer sausage saw saxophone scarecrow scarf/scarves scooter
    scrapbook screen screw screwdriver script scroll seatbelt seed shawl sheet shelf/shelves shield
    ship shirt shoelace shovel shower signal signature siren skateboard skeleton ski skirt skull
    sled sleeve slipper sock sofa song spanner spear spectacle sphere sponge spoon spring stamp
    statue steamer stick stocking stone stool stove straw strawberry string submarine suitcase
    sundial surfboard sweater sword symbol syringe table tablecloth tambourine tank tap tapestry
    tart taxi teapot telegram telephone telescope television tent thermometer thermos thimble thorn
    thread thumb ticket tie tile toaster tomato/tomatoes tongue toolbox tooth/teeth torch towel toy
    tractor trailer train trampoline tray treasure triangle tricycle trombone trophy trouser truck
    trumpet trunk tube tulip tunic tunnel turnip typewriter umbrella uniform vacuum valve van vase
    vault vegetable vehicle veil vest violin volcano/volcanoes wagon wallet walnut wardrobe watch
    watermelon weapon wheel wheelbarrow whip whisk whistle wig windmill window wing wire wok wrench
    wrist yacht zipper
"""

PLACES = """
    abbey academy airport alley apartment aquarium arch arena attic avenue bakery balcony barn
    basement bathroom bay beach bedroom border bungalow cabin cafe camp campus canal canyon
    cathedral cave cemetery chapel church cinema circus city classroom cliff clinic coast college
    corridor cottage country courtyard crossroad dairy dam desert dock dormitory drain embassy
    estate factory farm field flat forest forge fortress gallery garage garden greenhouse gym hall
    hamlet haven hill hospital hostel hotel house hut island jungle junction kennel kingdom kitchen
    laboratory lagoon lake laundry library lobby lodge mansion market marsh memorial mill mine
    mosque motel museum nursery oasis/oases office orchard palace parish park parliament pasture
    path pavement pavilion pier plantation playground port prairie prison quarry railway ranch
    region reservoir restaurant river room ruin sawmill school shed shop shore shrine skyscraper
    slope spa square stable stadium stage station street studio suburb supermarket swamp tavern
    temple terrace theatre tower town university valley village vineyard warehouse waterfall
    workshop yard zoo
"""

ADJECTIVES = """
    absent absurd active ancient angry annual anxious artificial ashamed asleep awful awkward
    beautiful bitter blind bold boring brave brief bright brilliant broad broken brown brutal busy
    calm careful careless cautious charming cheerful chilly civil classic clean clear clever clumsy
    cold colourful comic common complete complex confident confused constant convenient cool correct
    costly crazy creative crooked cruel curious curly current damp dangerous dark deaf decent deep
    delicate delicious dense different difficult digital dirty distant divine domestic double
    doubtful dramatic dreadful dry dull dusty eager early eastern easy elaborate elderly electric
    elegant empty endless enormous equal evil exact excellent exciting exotic expensive extra
    extreme faint faithful false familiar famous fancy fantastic fast fatal feeble fertile fierce
    filthy final fine firm flexible fluffy foolish foreign formal fortunate fragile frantic free
    fresh friendly frozen full funny furious fuzzy gentle genuine gigantic gloomy glorious golden
    good gorgeous graceful gradual grand grateful greasy greedy green grey grim guilty handsome
    handy happy hard harmless harsh hasty healthy heavy helpful hidden hollow honest hopeless
    horrible hot huge humble hungry icy ideal identical idle ignorant ill illegal immense imperial
    important impossible impressive innocent intense internal invisible jealous jolly joyful junior
    juicy keen kind large late lazy legal lengthy light likely little lively local lonely long loose
    loud lovely loving low loyal lucky mad magic magnificent major marvellous massive mature medical
    medium melted merry messy mighty mild minor miserable mobile modern modest moist muddy musical
    mysterious naked narrow nasty native natural naughty neat nervous nice noble noisy normal
    northern notable novel nutty oblong obvious odd official old open optional ordinary original
    outer oval painful patient peaceful peculiar perfect permanent pink plastic playful pleasant
    polite popular portable possible powerful practical precious precise pretty primitive private
    probable proper proud public pure purple puzzled quaint quick quiet random rapid rare ready real
    recent reckless regular reliable remote rich ridiculous rigid ripe romantic rotten rough round
    royal rude rural rusty sacred sad safe salty sandy scarce scary scarlet secret selfish senior
    sensible separate serious severe shabby shallow sharp shiny short shy silent silly similar
    simple single skilful sleepy slender slim slippery slow small smart smooth social soft solar
    solid southern spare special spicy spiral splendid square steady steep sticky stiff strange
    strict striped strong stubborn stupid sturdy subtle sudden suitable sunny superb sweet swift
    tall tame tasty tender tense terrible thick thin thirsty thorough tidy tight timid tiny tired
    tough tragic transparent tremendous tropical typical ugly ultimate unable uncertain unhappy
    unique unknown unusual upright upset urban urgent useful usual vacant vague valid valuable vast
    velvet vertical vicious violent visible vital vivid warm wealthy weird western wet white wicked
    wide wild willing wise wonderful wooden woollen worthy wounded yellow young zealous
"""

# What somebody does to a thing or to somebody.
VERBS = """
    abandon accept admire adopt adore analyse announce approach approve arrange attack attract
    auction avoid balance ban/banned bend/bent bite/bit bless blame block borrow bounce break/broke
    bring/brought build/built burn bury/buried calculate carry carve catch/caught change charge
    chase check choose/chose claim clean close collect combine compare conceal connect consider
    control/controlled copy cover crack crash create criticise cross crush curse cut/cut/cutting
    damage decorate defend deliver demand deny describe deserve design destroy detect discover
    discuss dislike display divide drag/dragged draw/drew drop/dropped dust earn enjoy entertain
    envy erase examine exchange explain explore export feed/fed fetch fill find/found finish fix
    fold follow forget/forgot/forgetting freeze/froze frighten gather grab/grabbed greet
    grind/ground guarantee handle hate hear/heard help hide/hid hire hit/hit/hitting hold/held
    hug/hugged hunt identify ignore imagine import improve include inherit inspect insult interrupt
    introduce invent invite judge keep/kept kick kiss lease leave/left lend/lent lift like load lock
    lose/lost love lower mark measure melt mend mention mix move multiply name need notice obey
    observe occupy offer order organise overlook pack paint paste photograph pick pinch plan/planned
    polish possess praise prepare press prevent print produce promise protect prove pull punch
    purchase push question rescue raise reach receive recognise recommend recycle refuse reject
    release remember remove rent repair replace request resist respect return reveal reward
    ride/rode/riding ruin rub/rubbed sacrifice save scatter scratch scrub/scrubbed seize select
    sell/sold send/sent serve shake/shook share shoot/shot shrink/shrank sketch slice smash sniff
    solve spill split/split/splitting spoil spot/spotted spread/spread stain steer stitch
    stop/stopped store stretch strike/struck study suck suggest support surprise surround suspect
    swing/swung take/took taste tear/tore tease test thank tickle touch trace track trade train
    translate transport trap/trapped treat trust try twist understand/understood untie use value
    visit want warn wash watch water welcome win/won/winning wipe worship wrap/wrapped
"""

# How somebody gets somewhere.
MOTIONS = """
    climb crawl creep/crept cycle dance dash drift drive/drove/driving fall/fell flee/fled fly/flew
    gallop glide go/went hike hop/hopped hurry jog/jogged leap/leapt limp march move paddle ramble
    return ride/rode/riding roll rush scramble skate skid/skidded skip/skipped slide/slid/sliding
    slip/slipped sneak sprint stagger stroll stumble swim/swam/swimming tiptoe
    travel/travelled/travelling trot/trotted wade walk wander
"""

ADVERBS = """
    accidentally always angrily anxiously awkwardly badly barely beautifully blindly boldly bravely
    briefly calmly carefully carelessly certainly cheerfully clearly cleverly clumsily constantly
    correctly deliberately easily eagerly elegantly eventually exactly finally foolishly frequently
    gently gladly gracefully gradually greedily happily hardly hastily honestly hopefully hungrily
    immediately instantly joyfully kindly lazily loudly madly merrily mysteriously nearly neatly
    nervously never obviously occasionally officially often openly patiently perfectly politely
    possibly probably promptly properly proudly quickly quietly rapidly rarely really recently
    regularly repeatedly rudely sadly safely secretly seldom silently simply sleepily slowly
    smoothly softly sometimes soon strangely suddenly surely swiftly terribly usually violently
    warmly wildly willingly wisely
"""

NAMES = """
    adam agnes albert alice amanda andrew angela anita anthony arthur barbara benjamin bernard betty
    brenda brian bridget bruno carla caroline catherine cecilia charles charlotte christine clara
    claudia conrad cynthia daniel daphne david deborah dennis diana dominic dorothy douglas edith
    edward eleanor elizabeth emily emma eric ernest esther eugene evelyn felix fiona florence
    frederick gabriel george gerald gilbert gloria gordon hannah harold harriet hector helen henry
    hilda howard hugo ingrid irene isaac isabel jacob janet jasmine jeremy jessica joanna jonathan
    joseph judith julia justin karen kevin laura lawrence leonard linda louisa lucy malcolm marcus
    margaret marian martha martin matilda matthew maurice melissa michael miranda monica nathan
    nicholas nora norman oliver olga oscar pamela patricia patrick penelope peter philip phoebe
    rachel raymond rebecca richard robert roger ronald rosalind rupert samuel sandra sarah sebastian
    sharon simon sophie stanley stella stephen susan sylvia theodore teresa thomas timothy ursula
    valerie vanessa veronica victor vincent virginia vivian walter wendy wilfred william winifred
    yvonne
"""

# Where something is, and where somebody goes.
WHERE = "behind beside near inside outside below above beneath opposite"
WHITHER = "to into towards across around through along past"

TIMES = """
    yesterday today tomorrow tonight on_monday on_tuesday on_wednesday on_thursday on_friday
    on_saturday on_sunday in_january in_february in_march in_april in_may in_june in_july in_august
    in_september in_october in_november in_december last_winter last_summer last_autumn
    every_morning every_evening at_noon at_midnight before_breakfast before_lunch after_dinner
    after_supper years_ago once_again
"""

COUNTS = """
    three five six seven nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety several many most some all few
"""

MATERIALS = """
    bamboo brass bronze butter cardboard cement clay concrete copper cotton glue gold gravel honey
    ivory leather linen mud nylon oil paper petrol porcelain rubber salt sand satin silver snow soap
    sugar timber wax wool
"""
