"""Named recipes: the values that differ from the defaults of `Recipe`."""

RECIPES = {
    # Wang et al. 2017, section 4.1; 160k steps of 64 images are 204.8 epochs of 50,000 images.
    "paper": dict(
        geometry="paper", epochs=205, batch_size=64, learning_rate=0.1, schedule="step", warmup_epochs=0.0,
        weight_decay=1e-4, augmentation="crop", dropout=0.0, classifier_l2=0.0, validation_split=0.0,
    ),
    # Wang et al. 2017, section 4.2: 530k steps, the rate divided by 10 at 200k, 400k and 500k. The paper does not
    # state the batch size; with 256 images, this project's choice, they are 105.9 epochs of 1,281,167 images.
    "imagenet": dict(
        dataset="folder", model="attention_56", geometry="imagenet", epochs=106, batch_size=256, learning_rate=0.1,
        schedule="step", step_at="0.3774,0.7547,0.9434", warmup_epochs=0.0, weight_decay=1e-4,
        augmentation="imagenet", mean="imagenet", dropout=0.0, classifier_l2=0.0,
    ),
    # The reference re-implementation: rotation, shift and flip; dropout and L2 at the classifier. It does not state
    # its optimizer and learning rate; Adam is this project's choice.
    "reference": dict(
        epochs=100, batch_size=64, optimizer="adam", learning_rate=1e-3, schedule="plateau", warmup_epochs=0.0,
        weight_decay=0.0, augmentation="affine", classifier_l2=1e-2,
    ),
    # For one GPU, following known recipes for fast training on CIFAR-10: large batches, a high learning rate with
    # linear decay, label smoothing, no decay of norms and biases, bfloat16, all images on the device. Keras waits for
    # the device at the end of each execution and then needs a millisecond or more, so an execution is a whole epoch.
    "race": dict(
        epochs=40, batch_size=512, learning_rate=0.4, schedule="linear", warmup_epochs=8.0, weight_decay=5e-4,
        decay_all=False, label_smoothing=0.1, augmentation="crop", alternate_flip=True, cutout=8, dropout=0.0,
        classifier_l2=0.0, ema=0.99, test_flip=True, validation_split=0.0, precision="mixed_bfloat16", jit=True,
        steps_per_execution=97, data_on_device=True, masks_every=0, checkpoint_epochs=1000,
    ),
    # The same for longer runs: smaller batches, mixup, a cosine schedule.
    "best": dict(
        epochs=200, batch_size=128, learning_rate=0.1, schedule="cosine", warmup_epochs=5.0, weight_decay=5e-4,
        decay_all=False, augmentation="crop", cutout=16, mix="mixup", dropout=0.0, classifier_l2=0.0, ema=0.999,
        test_flip=True, validation_split=0.0, precision="mixed_bfloat16", jit=True, steps_per_execution=30,
        data_on_device=True, masks_every=50, checkpoint_epochs=10,
    ),
    # For a few epochs on a CPU.
    "quick": dict(epochs=8, warmup_epochs=1.0, weight_decay=5e-4, rotation=5.0, shift=0.1, dropout=0.0, masks_every=1),
}  # fmt: skip
