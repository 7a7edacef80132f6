"""The text on which models are compared in general: no adapter's domain, and no part of a calibration."""

from typing import Final

BUILT_IN_TEXT: Final = """\
The ferry leaves the harbour at seven in the morning and comes back before dark. On the way it stops at two islands:
the larger one has a school, a bakery and a lighthouse, the smaller one nothing but sheep. Last winter the engine failed
half way across, and the captain let the wind carry the boat to the beach, where everybody climbed out laughing.

To cook rice, wash it twice in cold water, cover it with one and a half times its volume of water, and bring it to the
boil. Then turn the heat down, put the lid on, and wait for twelve minutes. Do not stir. Why not? Because the grains
break and the pot sticks.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Water boils at 100 degrees Celsius at sea level, but at only 90 degrees on a mountain 3,000 metres high. The reason is
the pressure of the air: the less of it there is, the sooner the bubbles can grow. That is why tea tastes weak up there,
and why beans take hours.

"Have you seen my glasses?" asked the old man. "They are on your nose," said the girl, and she was right. He thanked
her, sat down by the window, and read the letter from his brother for the third time.

Dear Anna, the apartment is small but bright, and the landlady lets me use the garden. On Monday I start at the library.
They need someone who can read old handwriting, and you know how long I have practised that. The trains are late every
day, so I walk. Please send my winter coat, the grey one, and the photograph of the dog. Yours, Martin

Bees find their way back to the hive by the sun. On cloudy days they see how the light of the sky is polarized, which
tells them where the sun must be. A bee that has found flowers dances on the comb: the angle of the dance gives the
direction, and its length the distance. Other bees follow the dance in the dark with their antennae.

The meeting began at ten with twelve members present. The treasurer reported an income of 4,310 and costs of 3,875; the
difference goes into the fund for the roof. Two offers for the roof have come in, and a third is expected by the end of
the month. It was agreed that nobody should sign anything before then. The next meeting is on 14 March.

SELECT name, COUNT(*) AS orders FROM customers JOIN orders ON orders.customer = customers.id
WHERE orders.placed >= '2021-01-01' GROUP BY name HAVING COUNT(*) > 3 ORDER BY orders DESC;

If you are lost in the forest, stay where you are. Most people who leave the path walk in circles, because one leg is a
little stronger than the other. Make yourself visible: put something bright on the ground, and three of anything, three
fires or three whistles, is understood as a call for help. Drink before you are thirsty. Night is colder than you think.

Glass is neither stirred nor poured into shape by accident. The sand must be free of iron, or the glass is green; soda
lowers the temperature at which it melts, and lime keeps it from dissolving in water later. Medieval windows are thicker
at the bottom because the makers put the heavy edge there, and not because glass flows.

The goalkeeper had not touched the ball for twenty minutes when the long pass came. She took two steps forward, thought
better of it, and went back. The striker saw her hesitate and shot at once. It hit the post, rolled along the line, and
stayed there as if it could not decide. By the time anyone moved, the referee had blown the whistle for the interval.

A mortgage is a loan for which a house is the security. The bank pays the seller, and the buyer pays the bank back in
monthly rates, at first mostly interest and later mostly principal. With a fixed rate the payments stay the same when
interest rises; with a variable rate they do not. Who sells the house early may have to pay a fee.
"""
"""A story, a recipe, programs, explanations, a conversation, a letter, minutes, advice."""
