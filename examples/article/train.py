"""The article's script on Keras 3: its network on a folder of pictures, saved at the end; README.md explains it."""

import argparse
import time

from keras import Input, Sequential
from keras._tf_keras.keras.preprocessing.image import ImageDataGenerator  # is tensorflow.keras.preprocessing.image
from keras.layers import Conv2D, Dense, Dropout, Flatten, MaxPooling2D
from keras.optimizers import Adam

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("train_dir", help="pictures, one folder for each class")
parser.add_argument("--out", default="article.keras")
parser.add_argument("--side", type=int, default=224, help="height and width")
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--epochs", type=int, default=20)
chosen = parser.parse_args()
size = (chosen.side, chosen.side)

datagen = ImageDataGenerator(rescale=1.0 / 255, validation_split=0.2)
pictures = {"target_size": size, "batch_size": chosen.batch, "class_mode": "categorical"}
train_generator = datagen.flow_from_directory(chosen.train_dir, subset="training", **pictures)
validation_generator = datagen.flow_from_directory(chosen.train_dir, subset="validation", shuffle=False, **pictures)
num_classes = train_generator.num_classes

model = Sequential()
model.add(Input((*size, 3)))
model.add(Conv2D(32, (3, 3), activation="relu", padding="same"))
model.add(Conv2D(32, (3, 3), activation="relu", padding="same"))
model.add(MaxPooling2D(pool_size=(2, 2)))
model.add(Dropout(0.25))

model.add(Conv2D(64, (3, 3), activation="relu", padding="same"))
model.add(Conv2D(64, (3, 3), activation="relu", padding="same"))
model.add(MaxPooling2D(pool_size=(2, 2)))
model.add(Dropout(0.25))

model.add(Flatten())
model.add(Dense(512, activation="relu"))
model.add(Dropout(0.5))
model.add(Dense(num_classes, activation="softmax"))

model.compile(loss="categorical_crossentropy", optimizer=Adam(learning_rate=0.001), metrics=["accuracy"])
model.fit(train_generator, epochs=chosen.epochs, validation_data=validation_generator, verbose=2)
model.save(chosen.out)

images, _ = next(validation_generator)
for batch in (1, len(images)):
    model.predict(images[:batch], verbose=0)
    began, seen = time.perf_counter(), 0
    while time.perf_counter() - began < 2:
        seen += len(model.predict(images[:batch], batch_size=batch, verbose=0))
    print(f"model.predict, batch {batch}: {seen / (time.perf_counter() - began):.0f} images/s")
