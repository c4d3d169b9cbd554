// SPDX-License-Identifier: GPL-2.0-only
/*
 * Each CPU gathers records in messages. Group packets gets single records, group flows
 * sums (merge.c), group snaps first bytes of packets. A message is sent when it is full,
 * when its oldest record has waited flush_ms, or when a reader asks.
 *
 * Counting is done here too, under the same lock.
 */
#include <linux/cpu.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/timekeeping.h>
#include <linux/timer.h>
#include <linux/workqueue.h>

#include "batch.h"
#include "config.h"
#include "merge.h"
#include "netlink.h"
#include "skip.h"
#include "stream.h"

/* Bits of sniffer_wanted.groups. */
#define BATCH_PACKETS	BIT(SNIFFER_GROUP_INDEX_PACKETS)
#define BATCH_SNAPS	BIT(SNIFFER_GROUP_INDEX_SNAPS)
#define BATCH_FLOWS	BIT(SNIFFER_GROUP_INDEX_FLOWS)

/**
 * struct batch_cpu - one CPU's batches and counters
 * @lock: guards all below. Taken with _bh by the hooks of this CPU (process context or
 *	softirq), by its timer, and by flushes. Nearly always its own CPU takes it,
 *	without contention. It is needed for CPU hotplug, when a timer moves to
 *	another CPU.
 * @id: which CPU
 * @seq: records so far, in any group
 * @packets: packets on the wire, of all records
 * @bytes: bytes on the wire, of all records
 * @by_how: records of each enum sniffer_how
 * @copies: records that are copies (SNIFFER_F_COPY)
 * @copy_packets: packets on the wire, of copies
 * @copy_bytes: bytes on the wire, of copies
 * @timer: pinned; runs while a batch waits
 * @records: for group packets
 * @flows: for group flows
 * @snaps: for group snaps
 * @snap_seq: snaps so far
 * @count: all other counters; those that the fields above hold stay 0 in it
 */
struct batch_cpu {
	spinlock_t lock;
	u16 id;
	u64 seq;
	u64 packets;
	u64 bytes;
	u64 by_how[SNIFFER_HOW_SLOTS];
	u64 copies;
	u64 copy_packets;
	u64 copy_bytes;
	struct timer_list timer;
	struct sniffer_stream records;
	struct sniffer_merge flows;
	struct sniffer_stream snaps;
	u64 snap_seq;
	struct sniffer_counters count;
};

DEFINE_PER_CPU(struct sniffer_wanted, sniffer_wanted);
static DEFINE_PER_CPU(struct batch_cpu, batch_cpus);
static u64 batch_instance;
static bool batch_stopped;

/* Under the lock. Fills all of @head but record_size and the fields that only flows have. */
static void batch_fill_head(struct batch_cpu *cpu, const struct sniffer_stream *stream,
			    struct sniffer_batch *head)
{
	head->version = SNIFFER_VERSION;
	head->cpu = cpu->id;
	head->count = stream->count;
	head->instance = batch_instance;
	head->batch_seq = stream->batch_seq;
	head->record_seq = stream->first;
	head->skipped = sniffer_skip_sum(cpu->id);
	head->packets = cpu->seq - cpu->copies + head->skipped;
	head->lost = stream->lost;
	head->mono_ns = ktime_get_ns();
	head->real_ns = ktime_get_real_ns();
	head->boot_ns = ktime_get_boottime_ns();
}

/* Under the lock. */
static void batch_send_records(struct batch_cpu *cpu)
{
	struct sniffer_stream *stream = &cpu->records;
	struct sniffer_batch head = { .record_size = sizeof(struct sniffer_record) };
	int err;

	if (!stream->data)
		return;
	batch_fill_head(cpu, stream, &head);
	err = sniffer_stream_send(stream, SNIFFER_GROUP_INDEX_PACKETS, &head, sizeof(head));
	cpu->count.batches++;
	if (err)
		cpu->count.lost_batch += stream->count;
	else
		cpu->count.sent += stream->count;
	if (err == -ENOMEM)
		stream->lost += stream->count;
}

/* Under the lock. */
static void batch_send_flows(struct batch_cpu *cpu)
{
	struct sniffer_stream *stream = &cpu->flows.stream;
	struct sniffer_flow_batch head = {
		.batch.record_size = sizeof(struct sniffer_flow_record),
		.wire_packets = cpu->packets, .wire_bytes = cpu->bytes,
	};
	u64 records = cpu->seq - stream->first;
	int err;

	if (!stream->data)
		return;
	batch_fill_head(cpu, stream, &head.batch);
	err = sniffer_stream_send(stream, SNIFFER_GROUP_INDEX_FLOWS, &head, sizeof(head));
	if (err) {
		cpu->count.flow_lost += records;
	} else {
		cpu->count.flow_sent += records;
		cpu->count.flows += stream->count;
	}
	if (err == -ENOMEM)
		stream->lost += records;
}

/* Under the lock. */
static void batch_send_snaps(struct batch_cpu *cpu)
{
	struct sniffer_batch head = { .record_size = 0 };

	if (!cpu->snaps.data)
		return;
	batch_fill_head(cpu, &cpu->snaps, &head);
	if (sniffer_stream_send(&cpu->snaps, SNIFFER_GROUP_INDEX_SNAPS, &head,
				sizeof(head)) == -ENOMEM)
		cpu->snaps.lost += cpu->snaps.count;
}

/* Under the lock. Records are sent before snaps, because a reader joins a snap to its record. */
static void batch_send(struct batch_cpu *cpu)
{
	batch_send_records(cpu);
	batch_send_flows(cpu);
	batch_send_snaps(cpu);
}

static void batch_expired(struct timer_list *timer)
{
	struct batch_cpu *cpu = container_of(timer, struct batch_cpu, timer);

	spin_lock_bh(&cpu->lock);
	batch_send(cpu);
	spin_unlock_bh(&cpu->lock);
}

/*
 * Under the lock of this CPU. Updates which groups have listeners. If a group has none
 * any more, its message is sent now. So no message has a gap within.
 */
static void batch_ask(struct batch_cpu *cpu)
{
	struct sniffer_wanted *wanted = this_cpu_ptr(&sniffer_wanted);
	unsigned int groups = 0, group;

	for (group = 0; group < SNIFFER_GROUPS; group++)
		if (sniffer_netlink_listening(group))
			groups |= BIT(group);
	if (wanted->groups & ~groups)
		batch_send(cpu);
	wanted->groups = groups;
	wanted->asked = jiffies;
}

/**
 * sniffer_batch_ask - update now which groups have listeners
 */
void sniffer_batch_ask(void)
{
	struct batch_cpu *cpu;

	local_bh_disable();
	cpu = this_cpu_ptr(&batch_cpus);
	spin_lock(&cpu->lock);
	batch_ask(cpu);
	spin_unlock(&cpu->lock);
	local_bh_enable();
}

/* Under the lock, when a message has begun: it must be sent in time. */
static void batch_arm(struct batch_cpu *cpu)
{
	if (!timer_pending(&cpu->timer) && !READ_ONCE(batch_stopped))
		mod_timer(&cpu->timer, jiffies + msecs_to_jiffies(sniffer_config_flush_ms()));
}

/* Under the lock. */
static void batch_put_record(struct batch_cpu *cpu, const struct sniffer_record *record)
{
	struct sniffer_stream *stream = &cpu->records;

	if (unlikely(!stream->data)) {
		if (!sniffer_stream_begin(stream, sniffer_config_batch() * sizeof(*record), cpu->seq)) {
			stream->lost++;
			cpu->count.lost_alloc++;
			return;
		}
		batch_arm(cpu);
	}
	*(struct sniffer_record *)sniffer_stream_reserve(stream, sizeof(*record)) = *record;
}

/* Under the lock. */
static void batch_put_flow(struct batch_cpu *cpu, const struct sniffer_record *record, u32 bytes,
			   struct sniffer_merge_place *place)
{
	struct sniffer_merge *flows = &cpu->flows;

	cpu->count.flow_records++;
	if (likely(flows->stream.data)) {
		if (likely(sniffer_merge_again(flows, record, bytes, place)) ||
		    likely(sniffer_merge_add(flows, record, bytes, place)))
			return;
		batch_send_flows(cpu);
	}
	if (!sniffer_merge_begin(flows, cpu->seq)) {
		flows->stream.lost++;
		cpu->count.flow_lost++;
		return;
	}
	batch_arm(cpu);
	sniffer_merge_add(flows, record, bytes, place);
}

/* Under the lock. @skb's data begins at the IP header. */
static void batch_put_snap(struct batch_cpu *cpu, const struct sniffer_record *record,
			   const struct sk_buff *skb)
{
	unsigned int caplen = min_t(unsigned int, skb->len, SNIFFER_SNAP_LEN);
	unsigned int size = sizeof(struct sniffer_snap) + ALIGN(caplen, 8);
	struct sniffer_stream *stream = &cpu->snaps;
	u64 seq = cpu->snap_seq++;
	struct sniffer_snap *snap;

	if (stream->data && stream->used + size > stream->room)
		batch_send(cpu);
	if (!stream->data) {
		if (!sniffer_stream_begin(stream, SNIFFER_STREAM_ROOM, seq)) {
			stream->lost++;
			return;
		}
		batch_arm(cpu);
	}
	snap = sniffer_stream_reserve(stream, size);
	memset(snap, 0, size);
	snap->time_ns = record->time_ns;
	snap->seq = record->seq;
	snap->cpu = record->cpu;
	snap->len = record->len;
	if (!skb_copy_bits(skb, 0, snap + 1, caplen))
		snap->caplen = caplen;
}

/**
 * sniffer_batch_add - put a record into this CPU's messages
 * @record: complete but for cpu and seq, which are set here
 * @skb: its packet, data at the IP header
 * @place: where an earlier record of this flow was added up, see sniffer_merge_add();
 *	updated
 */
void sniffer_batch_add(struct sniffer_record *record, const struct sk_buff *skb,
		       struct sniffer_merge_place *place)
{
	u32 bytes = record->len + (record->gso_segs - 1) * record->hdr_len;
	bool copy = record->flags & SNIFFER_F_COPY;
	bool task = !softirq_count();	/* received packets come with bottom halves off */
	struct batch_cpu *cpu;
	unsigned int wanted;

	if (task)
		local_bh_disable();
	cpu = this_cpu_ptr(&batch_cpus);
	spin_lock(&cpu->lock);
	/* the task may have moved to another CPU since the hook began */
	if (unlikely(this_cpu_read(sniffer_wanted.asked) != jiffies))
		batch_ask(cpu);
	wanted = this_cpu_read(sniffer_wanted.groups);

	record->cpu = cpu->id;
	record->seq = cpu->seq;
	if (wanted & BATCH_PACKETS)
		batch_put_record(cpu, record);
	else
		cpu->count.only_flows++;
	if (wanted & BATCH_FLOWS)
		batch_put_flow(cpu, record, bytes, place);

	cpu->seq++;
	cpu->packets += record->gso_segs;
	cpu->bytes += bytes;
	cpu->by_how[record->how]++;
	if (unlikely(copy)) {
		cpu->copies++;
		cpu->copy_packets += record->gso_segs;
		cpu->copy_bytes += bytes;
	}
	/* sent last, so that the head counts this record too */
	if (cpu->records.data && cpu->records.used == cpu->records.room)
		batch_send_records(cpu);
	if ((wanted & (BATCH_SNAPS | BATCH_PACKETS)) == (BATCH_SNAPS | BATCH_PACKETS) &&
	    !copy)
		batch_put_snap(cpu, record, skb);

	spin_unlock(&cpu->lock);
	if (task)
		local_bh_enable();
}

struct batch_flush_work {
	struct work_struct work;
	struct sniffer_tail tail;
	struct sniffer_flow_tail flows;
};

static void batch_flush_cpu(int id, struct sniffer_tail *tail, struct sniffer_flow_tail *flows)
{
	struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

	spin_lock_bh(&cpu->lock);
	batch_send(cpu);
	/* from here on a new member gets everything; an offline CPU will ask when it is back */
	if (id == smp_processor_id())
		batch_ask(cpu);
	tail->cpu = id;
	tail->batch_seq = cpu->records.batch_seq;
	tail->record_seq = cpu->seq;
	tail->skipped = sniffer_skip_sum(cpu->id);
	tail->packets = cpu->seq - cpu->copies + tail->skipped;
	tail->lost = cpu->records.lost;
	flows->tail = *tail;
	flows->tail.batch_seq = cpu->flows.stream.batch_seq;
	flows->tail.lost = cpu->flows.stream.lost;
	flows->wire_packets = cpu->packets;
	flows->wire_bytes = cpu->bytes;
	spin_unlock_bh(&cpu->lock);
}

static void batch_flush_here(struct work_struct *work)
{
	struct batch_flush_work *flush = container_of(work, struct batch_flush_work, work);

	local_bh_disable();
	batch_flush_cpu(smp_processor_id(), &flush->tail, &flush->flows);
	local_bh_enable();
}

/**
 * sniffer_batch_flush - send the messages of every CPU, full or not
 * @tails: filled with what each CPU has sent to group packets so far
 * @flows: the same for group flows
 * @max: room in each
 *
 * Process context. The work runs on each CPU itself, so that its counters stand still.
 * An offline CPU needs no work, but its counters are reported too.
 *
 * Return: number of tails.
 */
unsigned int sniffer_batch_flush(struct sniffer_tail *tails, struct sniffer_flow_tail *flows,
				 unsigned int max)
{
	struct batch_flush_work work;
	unsigned int count = 0;
	int cpu;

	cpus_read_lock();
	for_each_possible_cpu(cpu) {
		if (count == max)
			break;
		memset(&work, 0, sizeof(work));
		if (cpu_online(cpu)) {
			INIT_WORK_ONSTACK(&work.work, batch_flush_here);
			queue_work_on(cpu, system_highpri_wq, &work.work);
			flush_work(&work.work);
			destroy_work_on_stack(&work.work);
		} else {
			batch_flush_cpu(cpu, &work.tail, &work.flows);
		}
		tails[count] = work.tail;
		flows[count++] = work.flows;
	}
	cpus_read_unlock();
	return count;
}

/**
 * sniffer_batch_counters - add up the counters of all CPUs
 * @sum: filled, but for the counters that tables keep
 */
void sniffer_batch_counters(struct sniffer_counters *sum)
{
	const u64 *from;
	u64 *to = (u64 *)sum;
	unsigned int i;
	int id;

	memset(sum, 0, sizeof(*sum));
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		spin_lock_bh(&cpu->lock);
		from = (const u64 *)&cpu->count;
		for (i = 0; i < sizeof(*sum) / sizeof(u64); i++)
			to[i] += from[i];
		for (i = 0; i < SNIFFER_HOW_SLOTS; i++)
			sum->by_how[i] += cpu->by_how[i];
		sum->records += cpu->seq;
		sum->recorded += cpu->seq - cpu->copies;
		sum->copies += cpu->copies;
		sum->wire_packets += cpu->packets - cpu->copy_packets;
		sum->wire_bytes += cpu->bytes - cpu->copy_bytes;
		sum->skipped_listener += sniffer_skip_count(cpu->id, SNIFFER_SKIP_LISTENER);
		sum->skipped_fragment += sniffer_skip_count(cpu->id, SNIFFER_SKIP_FRAGMENT);
		sum->skipped_truncated += sniffer_skip_count(cpu->id, SNIFFER_SKIP_TRUNCATED);
		sum->skipped_other += sniffer_skip_count(cpu->id, SNIFFER_SKIP_OTHER);
		sum->packets += cpu->seq - cpu->copies + sniffer_skip_sum(cpu->id);
		spin_unlock_bh(&cpu->lock);
	}
}

/**
 * sniffer_batch_instance - when the module was loaded, in realtime ns
 */
u64 sniffer_batch_instance(void)
{
	return batch_instance;
}

int sniffer_batch_init(void)
{
	int err = sniffer_config_check();
	int id;

	if (err)
		return err;
	batch_instance = ktime_get_real_ns();
	sniffer_merge_init();
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		spin_lock_init(&cpu->lock);
		cpu->id = id;
		timer_setup(&cpu->timer, batch_expired, TIMER_PINNED);
	}
	return 0;
}

/* The hooks are gone. Send what waits while the family still exists. */
void sniffer_batch_stop(void)
{
	int id;

	WRITE_ONCE(batch_stopped, true);
	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		timer_delete_sync(&cpu->timer);
		spin_lock_bh(&cpu->lock);
		batch_send(cpu);
		spin_unlock_bh(&cpu->lock);
	}
}

/* The family is gone, so nobody can ask for a flush any more. */
void sniffer_batch_exit(void)
{
	int id;

	for_each_possible_cpu(id) {
		struct batch_cpu *cpu = per_cpu_ptr(&batch_cpus, id);

		timer_delete_sync(&cpu->timer);
		sniffer_stream_free(&cpu->records);
		sniffer_stream_free(&cpu->flows.stream);
		sniffer_stream_free(&cpu->snaps);
	}
}
