"""The loss against hand-computed numbers and the paper's equation."""

import pytest
import torch

from dreambooth_lib.training.losses import dreambooth_loss, per_sample_errors

ERRORS = torch.tensor([1.0, 3.0, 10.0, 20.0])
IS_PRIOR = torch.tensor([False, False, True, True])


def test_loss_by_hand():
    loss = dreambooth_loss(ERRORS, IS_PRIOR, prior_weight=0.5)
    assert (loss.instance.item(), loss.prior.item()) == (2.0, 15.0)
    assert loss.total.item() == 2.0 + 0.5 * 15.0


def test_weights_apply_to_each_sample_of_both_terms():
    weights = torch.tensor([1.0, 0.0, 0.1, 0.2])
    loss = dreambooth_loss(ERRORS, IS_PRIOR, 2.0, weights)
    assert loss.instance.item() == pytest.approx(0.5)
    assert loss.prior.item() == pytest.approx((1.0 + 4.0) / 2)
    assert loss.total.item() == pytest.approx(0.5 + 2 * 2.5)


def test_the_papers_equation_with_unequal_counts_and_any_order():
    """Check both expectations, each over its own kind: counts and order of rows must not matter."""
    errors, prior = torch.tensor([8.0, 1.0, 4.0]), torch.tensor([True, False, True])
    assert dreambooth_loss(errors, prior, 1.0).total.item() == 1.0 + 6.0


def test_lambda_scales_only_the_gradient_of_the_prior_term():
    gradients = []
    for prior_weight in (0.0, 1.0, 3.0):
        errors = ERRORS.clone().requires_grad_()
        dreambooth_loss(errors, IS_PRIOR, prior_weight).total.backward()
        gradients.append(errors.grad)
    for gradient, prior_weight in zip(gradients, (0.0, 1.0, 3.0), strict=True):
        torch.testing.assert_close(gradient[:2], torch.tensor([0.5, 0.5]))
        torch.testing.assert_close(gradient[2:], torch.full((2,), 0.5 * prior_weight))


def test_without_class_images_there_is_no_prior_term():
    loss = dreambooth_loss(ERRORS, torch.zeros(4, dtype=torch.bool), 1.0)
    assert loss.prior is None
    assert loss.total.item() == ERRORS.mean().item()


def test_per_sample_errors_are_means_over_all_but_the_batch_axis():
    prediction = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    target = torch.stack([torch.full((3, 4, 5), 2.0), torch.full((3, 4, 5), 3.0)])
    errors = per_sample_errors(prediction, target)
    assert errors.tolist() == [4.0, 9.0]
    assert errors.dtype == torch.float32


def test_wrong_shapes_and_batches_without_an_instance_image_are_rejected():
    with pytest.raises(ValueError, match=r"errors \[4\], is_prior \[3\]"):
        dreambooth_loss(ERRORS, IS_PRIOR[:3], 1.0)
    with pytest.raises(ValueError, match="one value per sample"):
        dreambooth_loss(ERRORS, IS_PRIOR, 1.0, torch.ones(8))
    with pytest.raises(ValueError, match="no instance image"):
        dreambooth_loss(ERRORS[2:], IS_PRIOR[2:], 1.0)
