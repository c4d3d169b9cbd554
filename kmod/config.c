// SPDX-License-Identifier: GPL-2.0-only
/* How many records a message takes, and how long a record waits. Set at load and by a command. */
#include <linux/module.h>
#include <linux/moduleparam.h>

#include "config.h"
#include "shared_proto.h"

static unsigned int batch = SNIFFER_BATCH_DEFAULT;
module_param(batch, uint, 0444);
MODULE_PARM_DESC(batch, "the most records in a message, 1 to 252 (default 128)");

static unsigned int flush_ms = SNIFFER_FLUSH_MS_DEFAULT;
module_param(flush_ms, uint, 0444);
MODULE_PARM_DESC(flush_ms, "the longest time that a record waits, in ms, 1 to 1000 (default 20)");

/**
 * sniffer_config_batch - the most records in a message
 */
unsigned int sniffer_config_batch(void)
{
	return READ_ONCE(batch);
}

/**
 * sniffer_config_flush_ms - the longest time that a record waits, in ms
 */
unsigned int sniffer_config_flush_ms(void)
{
	return READ_ONCE(flush_ms);
}

/**
 * sniffer_config_set - change both, from the next message on
 * @size: 1 to SNIFFER_BATCH_MAX
 * @interval: ms, 1 to SNIFFER_FLUSH_MS_MAX
 */
void sniffer_config_set(unsigned int size, unsigned int interval)
{
	WRITE_ONCE(batch, size);
	WRITE_ONCE(flush_ms, interval);
}

/**
 * sniffer_config_check - are the module parameters within their bounds?
 *
 * Return: 0 or -EINVAL.
 */
int sniffer_config_check(void)
{
	if (batch < 1 || batch > SNIFFER_BATCH_MAX) {
		pr_err("sniffer: batch must be 1 to %u, not %u\n", SNIFFER_BATCH_MAX, batch);
		return -EINVAL;
	}
	if (flush_ms < 1 || flush_ms > SNIFFER_FLUSH_MS_MAX) {
		pr_err("sniffer: flush_ms must be 1 to %u, not %u\n", SNIFFER_FLUSH_MS_MAX,
		       flush_ms);
		return -EINVAL;
	}
	return 0;
}
